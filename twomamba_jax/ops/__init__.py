"""Pure functions on arrays: the operation, its forms, and what surrounds it in a mixer. No Flax here."""
