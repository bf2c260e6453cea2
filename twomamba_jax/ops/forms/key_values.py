"""The key/value cache of the exponential score: attending to it and writing to it."""

import jax.numpy as jnp

from twomamba_jax.ops.decay import suffix_log_decay
from twomamba_jax.ops.numerics import contract
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.state import KeyValueCache


def logits(op: Operation, q, log_decay, visible, cache: KeyValueCache):
    """Log weights [B, G, R, T, S] of the cached tokens for each of T new ones.

    `log_decay [B, G, T]` is the decay from the cache's end up to each new token (None: none), `visible [B, T]` whether
    that token is in the cache's segment (None: all are). Slots out of sight get -inf.
    """
    x = contract("bgrik,bsgk->bgris", q, cache.keys, op.precision) * op.query_scale
    x = x + jnp.moveaxis(cache.log_weights, 1, 2)[:, :, None, None]
    if log_decay is not None:
        x = x + log_decay[:, :, None, :, None]
    return x if visible is None else jnp.where(visible[:, None, None, :, None], x, -jnp.inf)


def values(cache: KeyValueCache):
    """The cached values heads-first, [B, G, S, V]."""
    return jnp.moveaxis(cache.values, 1, 2)


def write(k, v, log_decay, segment, lengths, cache: KeyValueCache) -> KeyValueCache:
    """The cache after T new tokens; k, v [B, G, T, .], log_decay [B, G, T], lengths [B] the tokens that count.

    Tokens of earlier segments keep their slots with weight 0, so that slots count tokens.
    """
    batch, heads, size = k.shape[:3]
    wide = cache.log_weights.dtype
    if log_decay is None:
        log_decay = jnp.zeros((batch, heads, size), wide)
    new, old = suffix_log_decay(log_decay).astype(wide), cache.log_weights + log_decay.sum(-1)[:, None]
    if segment is not None:
        new = jnp.where((segment == segment[:, -1:])[:, None], new, -jnp.inf)
        old = jnp.where((segment[:, -1] == 0)[:, None, None], old, -jnp.inf)
    return KeyValueCache(
        keys=put(cache.keys, k, cache.length, lengths),
        values=put(cache.values, v, cache.length, lengths),
        log_weights=put(old, new, cache.length, lengths),
        length=cache.length + lengths.astype(cache.length.dtype),
    )


def put(slots, new, length, counts):
    """`slots [B, S, G, ...]` with the first `counts [B]` of `new [B, G, T, ...]` from slot `length [B]` on.

    What finds no slot is dropped.
    """
    index = slot_index(length, counts, new.shape[2], slots.shape[1])
    rows = jnp.arange(slots.shape[0])[:, None]
    return slots.at[rows, index].set(jnp.moveaxis(new, 1, 2).astype(slots.dtype), mode="drop")


def slot_index(length, counts, size: int, capacity: int):
    """The slots [..., B, size] of new tokens; `capacity`, where there is none, for tokens that do not count."""
    offsets = jnp.expand_dims(jnp.arange(size), range(counts.ndim))
    return jnp.where(offsets < counts[..., None], length[..., None] + offsets, capacity)


def overflows(cache: KeyValueCache, lengths):
    """[B]: True for rows whose new tokens do not fit."""
    return cache.length + lengths > cache.keys.shape[1]


def poison_overflow(y, cache: KeyValueCache, lengths):
    """y [B, ...] with NaN in the rows whose new tokens do not fit."""
    return jnp.where(overflows(cache, lengths).reshape(-1, *[1] * (y.ndim - 1)), jnp.nan, y)
