"""Slots of a cache: which of them new tokens take, and putting the tokens there."""

import jax.numpy as jnp


def slot_index(length, counts, size: int, capacity: int):
    """The slots [..., B, size] of new tokens; `capacity`, where there is none, for tokens that do not count."""
    offsets = jnp.expand_dims(jnp.arange(size), range(counts.ndim))
    return jnp.where(offsets < counts[..., None], length[..., None] + offsets, capacity)


def put_tokens(array, tokens, slots):
    """`array [..., B, G, S, .]` with `tokens [..., B, G, N, .]` in its `slots [..., B, N]`, in place.

    What has no slot, which is slot S or beyond, is dropped.
    """
    # All axes before the slots' are indexed too: XLA would otherwise put the slots' first, in a copy.
    *leading, _ = jnp.indices((*tokens.shape[: slots.ndim], 1), sparse=True)
    return array.at[*leading, slots[..., None, :]].set(tokens.astype(array.dtype), mode="drop")
