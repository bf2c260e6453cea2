"""What the exponential score keeps while it decodes: every key and value, with the log decay of each token.

A `KeyValueCache` holds how far each token has decayed by now, which changes with every token. Here the decays are as
they came, and summed from the end when they are needed: taking back tokens is taking back the length, to the bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from twomamba_jax.ops.decay import suffix_log_decay
from twomamba_jax.ops.decoding.new_tokens import NewTokens, put_tokens
from twomamba_jax.ops.forms import key_values as key_values
from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.ops.sharding import shard_stack
from twomamba_jax.ops.state import KeyValueCache
from twomamba_jax.shapes import Array, Float, Int


class AttentionCache(NamedTuple):
    """Tokens `start`, ..., `length` - 1 are in the segment that goes on; token t lies in slot t.

    Heads come first, as the products that read it want it. `log_decay` is None for a score without decay.
    """

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S V"]
    log_decay: Float[Array, "B G S"] | None
    start: Int[Array, "B"]
    length: Int[Array, "B"]


def write(new: NewTokens, cache: AttentionCache, partition: PartitionSpec | None) -> AttentionCache:
    """The cache with the new tokens in it. An axis may lead, as of layers; `partition` as in `shard_call`."""
    if cache.length.ndim == 1:
        return jax.tree.map(lambda x: x[0], write(*jax.tree.map(lambda x: x[None], (new, cache)), partition))
    # XLA, left to itself, gives every device the new tokens of all.
    return shard_stack(_write, partition, new, cache)


def _write(new: NewTokens, cache: AttentionCache) -> AttentionCache:
    slots = key_values.slot_index(cache.length, new.counts, new.keys.shape[3], cache.keys.shape[3])
    # XLA for GPUs would permute the axes of a whole cache before a loop over tokens, and again after it: in a copy.
    written = put_tokens(cache.keys, new.keys, slots), put_tokens(cache.values, new.values, slots)
    keys, values = with_layout_constraint(written, Layout(tuple(range(cache.keys.ndim))))
    return AttentionCache(
        keys=keys,
        values=values,
        log_decay=None if cache.log_decay is None else put_tokens(cache.log_decay, new.log_decay, slots),
        start=new.start,
        length=cache.length + new.counts,
    )


def roll_back(counts, cache: AttentionCache, partition: PartitionSpec | None) -> AttentionCache:
    """The cache without its last `counts [B]` tokens, whose slots are 0 again. An axis may lead, as in `write`.

    A slot that nobody sees has weight 0, and 0 times a NaN would be one.
    """
    if cache.length.ndim == 1:
        return jax.tree.map(lambda x: x[0], roll_back(counts, jax.tree.map(lambda x: x[None], cache), partition))
    return shard_stack(_clear, partition, jnp.broadcast_to(counts, cache.length.shape), cache)


@jax.jit
def _clear(counts, cache: AttentionCache) -> AttentionCache:
    """Slot by slot: they are few, and all others stay where they lie."""
    length, capacity = cache.length - counts, cache.keys.shape[3]
    of_slot = tuple(jnp.zeros_like(x[:, :, :, :1]) for x in (cache.keys, cache.values))

    def clear(index, arrays):
        slots = jnp.where(index < counts, length + index, capacity)[..., None]
        return tuple(put_tokens(x, zeros, slots) for x, zeros in zip(arrays, of_slot))

    keys, values = jax.lax.fori_loop(0, jnp.minimum(counts.max(), capacity), clear, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, length=length)


def segment_start(segment, cache: AttentionCache):
    """The slot of the first token of the segment that goes on after new tokens; `segment [B, T]` as in `stages`."""
    if segment is None:
        return cache.start
    first = jnp.argmax(segment == segment[:, -1:], axis=1)
    return jnp.where(segment[:, -1] == 0, cache.start, cache.length + first)


def as_state(cache: AttentionCache) -> KeyValueCache:
    """The state after every token so far."""
    slots = jnp.arange(cache.keys.shape[2])[None]
    seen = ((slots >= cache.start[:, None]) & (slots < cache.length[:, None]))[:, None]
    if cache.log_decay is None:
        weights = jnp.zeros(cache.keys.shape[:3], accumulation_dtype(cache.keys.dtype))
    else:
        weights = suffix_log_decay(jnp.where(seen, cache.log_decay, 0))
    arrays = (jnp.moveaxis(x, 1, 2) for x in (cache.keys, cache.values, jnp.where(seen, weights, -jnp.inf)))
    return KeyValueCache(*arrays, cache.length)
