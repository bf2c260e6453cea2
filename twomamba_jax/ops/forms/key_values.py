"""The key/value cache of the exponential score: attending to it and writing to it."""

import jax.numpy as jnp

from twomamba_jax.ops.decay import suffix_log_decay
from twomamba_jax.ops.numerics import accumulation_dtype, contract
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.slots import put_tokens, slot_index
from twomamba_jax.ops.state import KeyValueCache


def log_weights(cache: KeyValueCache):
    """How far each token has decayed by now, [B, G or 1, S]; -inf for slots that are empty or of an earlier segment."""
    slots = jnp.arange(cache.keys.shape[2])[None]
    seen = ((slots >= cache.start[:, None]) & (slots < cache.length[:, None]))[:, None]
    if cache.log_decay is None:
        return jnp.where(seen, jnp.zeros((), accumulation_dtype(cache.keys.dtype)), -jnp.inf)
    return jnp.where(seen, suffix_log_decay(jnp.where(seen, cache.log_decay, 0)), -jnp.inf)


def logits(op: Operation, q, log_decay, visible, cache: KeyValueCache):
    """Log weights [B, G, R, T, S] of the cached tokens for each of T new ones.

    `log_decay [B, G, T]` is the decay from the cache's end up to each new token (None: none), `visible [B, T]` whether
    that token is in the cache's segment (None: all are). Slots out of sight get -inf.
    """
    x = contract("bgrik,bgsk->bgris", q, cache.keys, op.precision) * op.query_scale
    x = x + log_weights(cache)[:, :, None, None]
    if log_decay is not None:
        x = x + log_decay[:, :, None, :, None]
    return x if visible is None else jnp.where(visible[:, None, None, :, None], x, -jnp.inf)


def write(k, v, log_decay, start, counts, cache: KeyValueCache) -> KeyValueCache:
    """The cache after the first `counts [B]` of T new tokens, in place; an axis may lead, as of layers in a stack.

    k, v [B, G, T, .] and log_decay [B, G, T], or None; `start [B]` as `segment_start` gives it. What finds no slot is
    dropped.
    """
    slots = slot_index(cache.length, counts, k.shape[-2], cache.keys.shape[-2])
    decays = cache.log_decay
    if decays is not None:
        decays = put_tokens(decays, jnp.zeros(k.shape[:-1], decays.dtype) if log_decay is None else log_decay, slots)
    return KeyValueCache(
        keys=put_tokens(cache.keys, k, slots),
        values=put_tokens(cache.values, v, slots),
        log_decay=decays,
        start=start,
        length=cache.length + counts.astype(cache.length.dtype),
    )


def segment_start(segment, cache: KeyValueCache):
    """The slot of the first token of the segment that goes on after new tokens; `segment [B, T]` as in `stages`.

    Tokens of earlier segments keep their slots, so that slots count tokens.
    """
    if segment is None:
        return cache.start
    first = jnp.argmax(segment == segment[:, -1:], axis=1).astype(cache.start.dtype)
    return jnp.where(segment[:, -1] == 0, cache.start, cache.length + first)


def overflows(cache: KeyValueCache, lengths):
    """[B]: True for rows whose new tokens do not fit."""
    return cache.length + lengths > cache.keys.shape[2]


def poison_overflow(y, cache: KeyValueCache, lengths):
    """y [B, ...] with NaN in the rows whose new tokens do not fit."""
    return jnp.where(overflows(cache, lengths).reshape(-1, *[1] * (y.ndim - 1)), jnp.nan, y)
