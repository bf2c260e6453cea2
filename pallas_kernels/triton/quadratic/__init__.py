"""Attention that is quadratic in the context: the three kernels of `pallas_kernels.quadratic`, in Triton."""
