"""Log decays: the parameterisations that make them, and the sums that the forms take of them.

Every sum here adds non-positive terms only and never subtracts two prefix sums. A difference of prefix sums loses
what the larger one's rounding takes: a running float32 sum is off by 1 % after 131,072 tokens of -0.7, and one strong
decay spoils every later difference in its chunk.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.shapes import Array, Float

Decay = Literal["none", "discretized", "softplus", "memoryless"]
DECAYS = ("none", "discretized", "softplus", "memoryless")

# exp(-128) is 0 in float32: a stronger decay would change nothing but the sums' rounding.
STRONGEST_LOG_DECAY = -128.0

# Pairs inside a tile are summed by a product with a constant 0/1 tensor of TILE^3 entries; 32 keeps it in cache.
TILE = 32


def step_size(projection: Float[Array, "B T G"], bias: Float[Array, "G"] | None = None) -> Float[Array, "B T G"]:
    """The discretisation step `dt = softplus(h W_dt + dt_bias)` (Algorithm 2), in float32 or wider."""
    return jax.nn.softplus(projection if bias is None else projection + bias[None, None])


def discretized_decay(a_log: Float[Array, "G"], dt: Float[Array, "B T G"]) -> Float[Array, "B T G"]:
    """Mamba-2's log decay, `a = -exp(A_log) dt` (Algorithm 2; "original" in the paper's tables)."""
    return -jnp.exp(a_log)[None, None] * dt


def softplus_decay(projection: Float[Array, "B T G"], bias: Float[Array, "G"] | None = None) -> Float[Array, "B T G"]:
    """The simplified log decay, `a = -softplus(h W_A)` (Algorithm 4), or `a = -softplus(h W_A + b)`."""
    return -jax.nn.softplus(projection if bias is None else projection + bias[None, None])


def clamp_log_decay(log_decay: Float[Array, "..."] | None, dtype) -> Float[Array, "..."] | None:
    """Decays in the dtype of the sums of `dtype` inputs, none below STRONGEST_LOG_DECAY (NaN goes through)."""
    if log_decay is None:
        return None
    log_decay = log_decay.astype(accumulation_dtype(dtype))
    return jnp.where(log_decay < STRONGEST_LOG_DECAY, STRONGEST_LOG_DECAY, log_decay)


def prefix_log_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T"]:
    """a_0 + ... + a_t: the decay of what was there before token 0, as token t sees it."""
    return jnp.cumsum(log_decay, axis=-1)


def suffix_log_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T"]:
    """a_{t+1} + ... + a_{T-1}: the decay of token t as the end sees it."""
    inclusive = jnp.cumsum(log_decay[..., ::-1], axis=-1)[..., ::-1]
    return jnp.concatenate([inclusive[..., 1:], jnp.zeros_like(inclusive[..., :1])], axis=-1)


def pairwise_log_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T T"]:
    """a_{j+1} + ... + a_i for j <= i: the log decay of token j as token i sees it. Above the diagonal: not positive.

    Pairs of one tile are summed directly; those of two tiles from the rest of j's tile, the tiles between (by the same
    function one level up), and i's tile up to i.
    """
    size = log_decay.shape[-1]
    if size <= TILE:
        t = jnp.arange(size)
        between = (t[None, :, None] < t[None, None, :]) & (t[None, None, :] <= t[:, None, None])
        return jnp.einsum("...t,ijt->...ij", log_decay, between.astype(log_decay.dtype), precision="highest")
    tiles = _tiles(log_decay)
    return _assemble(
        prefix_log_decay(tiles)[..., :, :, None, None]
        + _between_tiles(tiles)[..., :, None, :, None]
        + suffix_log_decay(tiles)[..., None, None, :, :],
        pairwise_log_decay(tiles),
        size,
    )


def pairwise_decay(log_decay: Float[Array, "... T"]) -> Float[Array, "... T T"]:
    """exp(a_{j+1} + ... + a_i) for j <= i, and 0 for j > i.

    The same sums as `pairwise_log_decay`, exponentiated one by one: pairs of two tiles are then a product of a factor
    per row, one per pair of tiles and one per column, none above 1, and cost no exponential of their own.
    """
    size = log_decay.shape[-1]
    if size <= TILE:
        causal = jnp.tril(jnp.ones((size, size), bool))
        return jnp.exp(jnp.where(causal, pairwise_log_decay(log_decay), -jnp.inf))
    tiles = _tiles(log_decay)
    earlier = jnp.tril(jnp.ones((tiles.shape[-2],) * 2, bool), -1)
    between = jnp.exp(jnp.where(earlier, _between_tiles(tiles), -jnp.inf))
    rows = jnp.exp(prefix_log_decay(tiles))[..., :, :, None] * between[..., :, None, :]
    columns = jnp.exp(suffix_log_decay(tiles))
    return _assemble(rows[..., None] * columns[..., None, None, :, :], pairwise_decay(tiles), size)


def _tiles(log_decay):
    """[..., T] -> [..., N, TILE], padded with no decay."""
    count = -(-log_decay.shape[-1] // TILE)
    padding = [(0, 0)] * (log_decay.ndim - 1) + [(0, count * TILE - log_decay.shape[-1])]
    return jnp.pad(log_decay, padding).reshape(*log_decay.shape[:-1], count, TILE)


def _between_tiles(tiles):
    """The log decay [..., N, N] over all tiles after j and before i."""
    up_to = pairwise_log_decay(tiles.sum(-1))
    return jnp.concatenate([jnp.zeros_like(up_to[..., :1, :]), up_to[..., :-1, :]], axis=-2)


def _assemble(across, within, size):
    """Pairs of two tiles [..., N, TILE, N, TILE] and of one [..., N, TILE, TILE] as one matrix [..., size, size]."""
    count, width = within.shape[-3:-1]
    own_tile = jnp.eye(count, dtype=bool)[:, None, :, None]
    pairs = jnp.where(own_tile, within[..., :, :, None, :], across)
    return pairs.reshape(*within.shape[:-3], count * width, count * width)[..., :size, :size]
