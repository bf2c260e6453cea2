"""One token and folds of a ring in Triton: the kernels of `pallas_kernels.decoding` for every NVIDIA GPU."""
