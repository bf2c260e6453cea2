"""Gradient accumulation: a batch in microbatches, one after the other, with the result of the whole batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.ops.numerics import accumulation_dtype

Batch = dict[str, jax.Array]


def sum_over_microbatches(function: Callable[[Batch], Any], batch: Batch, count: int, row_shards: int = 1) -> Any:
    """The sum of `function(microbatch)` over `count` microbatches, in float32 or wider, returned in its own dtypes.

    Of what `function` gives, only one microbatch's is held besides the sum. It must give sums over tokens itself: means
    would count the tokens of a microbatch with few of them for more.

    Args:
      function: from a microbatch to a pytree of arrays.
      batch: arrays [B, T].
      count: N; N x row_shards must divide B.
      row_shards: how many devices the mesh shards the rows over. Each cuts its own rows: a microbatch has
        B / (N row_shards) of every device's, and no row moves between them.

    Raises:
      ValueError: N x row_shards does not divide B.
    """
    rows = len(batch["tokens"])
    if rows % (count * row_shards):
        raise ValueError(
            f"batch_size={rows} must be a multiple of microbatches x mesh.data x mesh.fsdp = {count} x {row_shards}"
        )
    if count == 1:
        return function(batch)

    def cut(array):
        parts = array.reshape(row_shards, count, -1, array.shape[1])
        parts = jnp.swapaxes(parts, 0, 1).reshape(count, -1, array.shape[1])
        return nn.with_logical_constraint(parts, (None, "batch", "length"))

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda part: part[0], parts))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, accumulation_dtype(leaf.dtype)), shapes)
    total, _ = jax.lax.scan(add, start, parts)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, shapes)
