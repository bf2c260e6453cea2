"""GPU kernels in Pallas Mosaic GPU: arrays in, arrays out; this package never imports `twomamba_jax`.

`quadratic` is attention whose time is quadratic in the context, `chunked` attention whose time is linear in it, both
forward and backward; `decoding` is one token, and the fold of a ring into its state.
"""
