"""One token and folds of a ring: the kernels of decoding."""
