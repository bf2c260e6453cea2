"""The GPU kernels as an implementation of the operation: when they can compute a call, and how they are spread."""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.device import unsupported_device
from twomamba_jax.ops.operation import Operation

MOSAIC_GPU = "mosaic_gpu"

# Tokens up to which the quadratic kernels are faster than XLA's chunked form on one H200 (docs/performance.md).
LONGEST = {"linear": 16384, "squared": 131072, "exp": sys.maxsize}


def unsupported(op: Operation, q, k, v, initial_state, partition: PartitionSpec | None, form) -> str | None:
    """Why the kernels cannot compute this call here, or None if they can.

    What is heavy to import, and not there on every platform, is imported where there is a device for it.
    """
    if reason := unsupported_device():
        return reason
    if form != "parallel":
        return f"it has the parallel form only, and this is form={form!r}"
    if initial_state is not None:
        return "it takes no initial_state"
    if partition is not None and len(partition) > 1 and _size(partition[1]) > 1:
        return f"it needs all tokens of a sequence on one device, and partition={partition} spreads them"
    from pallas_kernels.quadratic.attention import unsupported as unsupported_call

    return unsupported_call(q, k, v, score=op.score, precision=op.precision)


def parallel(op: Operation, q, k, v, log_decay, run, partition: PartitionSpec | None):
    """y [B, T, H, V] in q's dtype, for arrays [B, T, heads, dim]; `run` as in `segments.segment_runs`.

    A kernel is not partitioned by the compiler. Where a mesh is set, each device computes the batch entries and heads
    that `partition` gives it.
    """
    from pallas_kernels.quadratic.attention import Attention, attention

    spec = Attention(op.score, op.normalize, op.query_scale, op.denominator_floor)
    call = functools.partial(attention, spec)
    if log_decay is not None:
        log_decay = log_decay.astype(jnp.float32)
    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return call(q, k, v, log_decay, run)
    batch, _, heads, *_ = (*partition, None, None, None)
    array, decay, rows = PartitionSpec(batch, None, heads), PartitionSpec(batch, None, heads), PartitionSpec(batch)
    specs = (array, array, array, None if log_decay is None else decay, None if run is None else rows)
    return jax.shard_map(call, in_specs=specs, out_specs=array, check_vma=False)(q, k, v, log_decay, run)


def _size(axes) -> int:
    """How many devices the mesh axes spread an array's axis over."""
    shape = jax.sharding.get_abstract_mesh().shape
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= shape.get(name, 1)
    return size
