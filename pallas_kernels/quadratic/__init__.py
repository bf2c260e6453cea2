"""Attention that is quadratic in the context: `attention.attention`, its kernels, and their tile sizes."""
