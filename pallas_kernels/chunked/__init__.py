"""The chunked form of attention with squared scores as Mosaic GPU kernels: linear in the length."""
