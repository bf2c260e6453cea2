"""Rotary position embedding (Su et al., arXiv 2104.09864), interleaved pairs as in the authors' code."""

import jax.numpy as jnp

from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.shapes import Array, Float, Int


def apply_rope(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float = 10000.0
) -> Float[Array, "B T H K"]:
    """Turns the pair (x_{2i}, x_{2i+1}) of the token at position p by the angle p theta^(-2i / K).

    Angles are in float32 or wider, the result in x's dtype.

    Raises:
      ValueError: K is odd.
    """
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary embeddings turn pairs: the head dimension must be even, got {size}")
    wide = accumulation_dtype(x.dtype)
    # Every number of a pair with its angle, and its partner times its sine: a GPU reads and writes whole vectors so.
    place = jnp.arange(size)[None, None]
    frequencies = theta ** (-(place // 2 * 2).astype(wide) / size)
    angles = (positions[..., None].astype(wide) * frequencies)[:, :, None]
    turned = x.astype(wide)
    partner = turned.reshape(*x.shape[:-1], size // 2, 2)[..., ::-1].reshape(x.shape)
    sign = jnp.where(place % 2, 1, -1).astype(wide)[:, :, None]
    return (turned * jnp.cos(angles) + partner * (sign * jnp.sin(angles))).astype(x.dtype)
