"""GPU kernels in Pallas Mosaic GPU: arrays in, arrays out; this package never imports `twomamba_jax`.

`quadratic` is attention that is quadratic in the context, for every score, forward and backward.
"""
