"""The cache of a mixer while it decodes: a finite state with a ring of tokens beside it, or keys and values."""
