"""Axes: public arrays are [B, T, heads, dim]; those inside are heads-first, with R = H // G query heads per group."""

import jax.numpy as jnp

from twomamba_jax.ops.numerics import accumulation_dtype


def heads_first(q, k, v, log_decay):
    """[B, T, H, K] -> [B, G, R, T, K]; [B, T, G, .] -> [B, G, T, .]; a `log_decay` of None stays None."""
    return (
        grouped_queries(q, k.shape[2]),
        jnp.moveaxis(k, 1, 2),
        jnp.moveaxis(v, 1, 2),
        None if log_decay is None else jnp.moveaxis(log_decay, 1, 2),
    )


def grouped_queries(q, num_groups: int):
    """[B, T, H, K] -> [B, G, R, T, K]."""
    return jnp.moveaxis(q.reshape(*q.shape[:2], num_groups, q.shape[2] // num_groups, q.shape[-1]), 1, 3)


def tokens_first(y):
    """[B, G, R, T, V] -> [B, T, H, V]."""
    y = jnp.moveaxis(y, 3, 1)
    return y.reshape(*y.shape[:2], y.shape[2] * y.shape[3], y.shape[-1])


def repeat_heads(x, num_heads: int):
    """x [B, T, N, K] as [B, T, H, K], head h from h // (H // N); its gradient is summed in float32 or wider."""
    wide = jnp.repeat(x.astype(accumulation_dtype(x.dtype)), num_heads // x.shape[2], axis=2)
    return wide.astype(x.dtype)
