"""The kernels in Triton, called through jax-triton: for every NVIDIA GPU of compute capability 8.0 or later."""
