"""Log decays: the parameterisations that make them, and the sums that the forms take of them.

Every sum here adds non-positive terms only and never subtracts two prefix sums. A difference of prefix sums loses
what the larger one's rounding takes: a running float32 sum is off by 1 % after 131,072 tokens of -0.7, and one strong
decay spoils every later difference in its chunk.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from twomamba_jax.shapes import Array, Float

Decay = Literal["none", "discretized", "softplus", "memoryless"]
DECAYS = ("none", "discretized", "softplus", "memoryless")

# exp(-128) is 0 in float32: a stronger decay would change nothing but the sums' rounding.
STRONGEST_LOG_DECAY = -128.0

# Pairs inside a tile are summed by a product with a constant 0/1 tensor of TILE^3 entries; 32 keeps it in cache.
TILE = 32


def step_size(projection: Float[Array, "B T G"], bias: Float[Array, "G"] | None = None) -> Float[Array, "B T G"]:
    """The discretisation step `dt = softplus(h W_dt + dt_bias)` (Algorithm 2), in float32 or wider."""
    return jax.nn.softplus(projection if bias is None else projection + bias)


def discretized_decay(a_log: Float[Array, "G"], dt: Float[Array, "B T G"]) -> Float[Array, "B T G"]:
    """Mamba-2's log decay, `a = -exp(A_log) dt` (Algorithm 2; "original" in the paper's tables)."""
    return -jnp.exp(a_log) * dt


def softplus_decay(projection: Float[Array, "B T G"]) -> Float[Array, "B T G"]:
    """The simplified log decay, `a = -softplus(h W_A)` (Algorithm 4)."""
    return -jax.nn.softplus(projection)


def prefix_log_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T"]:
    """a_0 + ... + a_t: the decay of what was there before token 0, as token t sees it."""
    return jnp.cumsum(log_decay, axis=-1)


def suffix_log_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T"]:
    """a_{t+1} + ... + a_{T-1}: the decay of token t as the end sees it."""
    inclusive = jnp.cumsum(log_decay[..., ::-1], axis=-1)[..., ::-1]
    return jnp.concatenate([inclusive[..., 1:], jnp.zeros_like(inclusive[..., :1])], axis=-1)


def pairwise_log_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T T"]:
    """a_{j+1} + ... + a_i for j <= i: the decay of token j as token i sees it. Above the diagonal: anything.

    Pairs of one tile are summed directly; those of two tiles from the rest of j's tile, the tiles between (by the same
    function one level up), and i's tile up to i.
    """
    size = log_decay.shape[-1]
    if size <= TILE:
        t = jnp.arange(size)
        between = (t[None, :, None] < t[None, None, :]) & (t[None, None, :] <= t[:, None, None])
        return jnp.einsum("...t,ijt->...ij", log_decay, between.astype(log_decay.dtype), precision="highest")

    tiles = -(-size // TILE)
    padding = [(0, 0)] * (log_decay.ndim - 1) + [(0, tiles * TILE - size)]
    tiled = jnp.pad(log_decay, padding).reshape(*log_decay.shape[:-1], tiles, TILE)
    prefix, suffix = prefix_log_decay(tiled), suffix_log_decay(tiled)
    up_to = pairwise_log_decay(prefix[..., -1])
    between = jnp.concatenate([jnp.zeros_like(up_to[..., :1, :]), up_to[..., :-1, :]], axis=-2)
    across = prefix[..., :, :, None, None] + between[..., :, None, :, None] + suffix[..., None, None, :, :]
    own_tile = jnp.eye(tiles, dtype=bool)[:, None, :, None]
    pairs = jnp.where(own_tile, pairwise_log_decay(tiled)[..., :, :, None, :], across)
    return pairs.reshape(*log_decay.shape[:-1], tiles * TILE, tiles * TILE)[..., :size, :size]
