"""GPU kernels in Pallas Mosaic GPU: arrays in, arrays out; this package never imports `twomamba_jax`.

It holds no kernel yet, so `decay_attention(implementation="mosaic_gpu")` raises and `implementation=None` runs XLA.
"""
