"""The operation on a mesh: every device computes its batch entries, its heads and its slice of the tokens."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from twomamba_jax.ops.segments import number_segments
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import State


def sequence_axis(partition: PartitionSpec | None) -> SequenceAxis | None:
    """The axis of the mesh that is set over which `partition` shards the tokens; None: they are on one device."""
    if partition is None or len(partition) < 2:
        return None
    size = devices_of(partition[1])
    return SequenceAxis(partition[1], size) if size > 1 else None


def shard_call(call: Callable, partition: PartitionSpec | None, q, k, v, log_decay, segment_ids, state: State | None):
    """call(q, k, v, log_decay, segment, state, axis) -> (y, final state or None), on each device with its part of them.

    Args:
      call: takes `segment` as in `segments.number_segments`, and the `SequenceAxis` over which the tokens are sharded,
        or None. Where they are sharded, the state is that before the first device's tokens, on all devices, and the
        final state that after the last one's.
      partition: the mesh axes of q [B, T, H, K]; None, or no mesh: one call for all of the arrays.
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, V].
      log_decay: [B, T, G], or None.
      segment_ids: [B, T], or None.
      state: before the first token, or None.

    Raises:
      ValueError: B, T, H or G is no multiple of the devices that it is sharded over.
    """
    axis = sequence_axis(partition)

    def local(q, k, v, log_decay, segment_ids, state):
        segment = None if segment_ids is None else number_segments(segment_ids, axis=axis)
        return call(q, k, v, log_decay, segment, state, axis)

    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, log_decay, segment_ids, state)
    batch, _, heads, *_ = (*partition, None, None, None)
    tokens = None if axis is None else axis.name
    check_multiple(q.shape[0], "rows of the batch", batch)
    check_multiple(q.shape[1], "tokens", tokens)
    check_multiple(q.shape[2], "query heads", heads)
    check_multiple(k.shape[2], "key/value heads", heads)
    array, of_state = PartitionSpec(batch, tokens, heads), PartitionSpec(batch, heads)
    of_initial = jax.tree.map(lambda x: PartitionSpec(*(batch, heads)[: x.ndim]), state)
    of_decay = None if log_decay is None else array
    of_ids = None if segment_ids is None else PartitionSpec(batch, tokens)
    in_specs = (array, array, array, of_decay, of_ids, of_initial)
    sharded = jax.shard_map(local, in_specs=in_specs, out_specs=(array, of_state), check_vma=False)
    return sharded(q, k, v, log_decay, segment_ids, state)


def shard_stack(call: Callable, partition: PartitionSpec | None, *stacks):
    """call(*stacks) -> one like the last, on each device with its part of their arrays [L, B, G, ...] and [L, B].

    `partition` is as in `shard_call`.
    """
    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return call(*stacks)
    batch, _, heads, *_ = (*partition, None, None, None)
    specs = jax.tree.map(lambda x: PartitionSpec(None, *(batch, heads)[: x.ndim - 1]), stacks)
    return jax.shard_map(call, in_specs=specs, out_specs=specs[-1], check_vma=False)(*stacks)


def check_multiple(size: int, what: str, axes) -> None:
    """Raises ValueError where `size` things cannot be dealt out over the mesh axes in equal parts."""
    if size % (devices := devices_of(axes)):
        raise ValueError(
            f"{size} {what} cannot be sharded over the {devices} devices of mesh axis {axes!r}: make them a multiple "
            f"of {devices}, or that axis smaller"
        )


def devices_of(axes) -> int:
    """How many devices the mesh axes shard an array's axis over."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in axis_names(axes))


def axis_names(axes) -> tuple[str, ...]:
    """Mesh axes of one axis of an array (None, a name, or several names), each by its name."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
