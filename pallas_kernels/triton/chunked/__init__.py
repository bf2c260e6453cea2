"""The chunked form of attention with squared and linear scores as Triton kernels: linear in the length."""
