"""What the exponential score keeps while it decodes: a `KeyValueCache`, written where it lies, and rolled back."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from twomamba_jax.ops.decoding.new_tokens import NewTokens
from twomamba_jax.ops.forms import key_values
from twomamba_jax.ops.sharding import shard_stack
from twomamba_jax.ops.slots import put_tokens
from twomamba_jax.ops.state import KeyValueCache


def write(new: NewTokens, cache: KeyValueCache, partition: PartitionSpec | None) -> KeyValueCache:
    """The cache with the new tokens in it. An axis may lead, as of layers; `partition` as in `shard_call`."""
    if cache.length.ndim == 1:
        return jax.tree.map(lambda x: x[0], write(*jax.tree.map(lambda x: x[None], (new, cache)), partition))
    # XLA, left to itself, gives every device the new tokens of all.
    return shard_stack(_write, partition, new, cache)


def _write(new: NewTokens, cache: KeyValueCache) -> KeyValueCache:
    cache = key_values.write(new.keys, new.values, new.log_decay, new.start, new.counts, cache)
    # XLA for GPUs would permute the axes of a whole cache before a loop over tokens, and again after it: in a copy.
    keys, values = with_layout_constraint((cache.keys, cache.values), Layout(tuple(range(cache.keys.ndim))))
    return cache._replace(keys=keys, values=values)


def roll_back(counts, cache: KeyValueCache, partition: PartitionSpec | None) -> KeyValueCache:
    """The cache without its last `counts [B]` tokens, whose slots are 0 again. An axis may lead, as in `write`.

    A slot that nobody sees has weight 0, and 0 times a NaN would be one.
    """
    if cache.length.ndim == 1:
        return jax.tree.map(lambda x: x[0], roll_back(counts, jax.tree.map(lambda x: x[None], cache), partition))
    return shard_stack(_clear, partition, jnp.broadcast_to(counts, cache.length.shape), cache)


@jax.jit
def _clear(counts, cache: KeyValueCache) -> KeyValueCache:
    """Slot by slot: they are few, and all others stay where they lie."""
    length, capacity = cache.length - counts, cache.keys.shape[3]
    of_slot = tuple(jnp.zeros_like(x[:, :, :, :1]) for x in (cache.keys, cache.values))

    def clear(index, arrays):
        slots = jnp.where(index < counts, length + index, capacity)[..., None]
        return tuple(put_tokens(x, zeros, slots) for x, zeros in zip(arrays, of_slot))

    keys, values = jax.lax.fori_loop(0, jnp.minimum(counts.max(), capacity), clear, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, length=length)
