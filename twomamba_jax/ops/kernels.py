"""The GPU kernels as an implementation of the operation: when they can compute a call, and how they are spread."""

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.device import device_kind, unsupported_device
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.state import FiniteState

MOSAIC_GPU = "mosaic_gpu"

# Tokens up to which the quadratic kernels are faster on one H200 than XLA's chunked form, forward and backward together
# (docs/kernels.md).
LONGEST = {"linear": 16384, "squared": 131072, "exp": sys.maxsize}


def unsupported(op: Operation, q, k, v, initial_state, partition: PartitionSpec | None, chunk_size, form) -> str | None:
    """Why the kernels cannot compute this call here, or None if they can.

    What is heavy to import, and not there on every platform, is imported where there is a device for it.
    """
    if reason := unsupported_device():
        return reason
    if form not in ("parallel", "chunked"):
        return f"it has the parallel and the chunked form, and this is form={form!r}"
    if form == "parallel" and initial_state is not None:
        return "it takes no initial_state in the parallel form"
    if partition is not None and len(partition) > 1 and _size(partition[1]) > 1:
        return f"it needs all tokens of a sequence on one device, and partition={partition} spreads them"
    from pallas_kernels.quadratic.attention import unsupported as unsupported_call

    if reason := unsupported_call(q, k, v, score=op.score, precision=op.precision):
        return reason
    if form == "parallel":
        return None
    from pallas_kernels.chunked.attention import unsupported as unsupported_in_chunks

    return unsupported_in_chunks(q, score=op.score, chunk_size=chunk_size)


def crossover(op: Operation, q) -> int:
    """Tokens up to which the quadratic kernels are faster than the chunked ones, forward and backward together."""
    from pallas_kernels.chunked.table import crossover as measured

    return measured(device_kind(), op.score, "forward+backward", q.shape[0] * q.shape[2])


def parallel(op: Operation, q, k, v, log_decay, run, partition: PartitionSpec | None):
    """y [B, T, H, V] in q's dtype, for arrays [B, T, heads, dim]; `run` as in `segments.segment_runs`.

    A kernel is not partitioned by the compiler. Where a mesh is set, each device computes the batch entries and heads
    that `partition` gives it.
    """
    from pallas_kernels.quadratic.attention import Attention, attention

    spec = Attention(op.score, op.normalize, op.query_scale, op.denominator_floor)
    return _spread(functools.partial(attention, spec), partition, (q, k, v), log_decay, run)


def chunked(
    op: Operation,
    q,
    k,
    v,
    log_decay,
    run,
    state: FiniteState | None,
    *,
    return_final_state: bool,
    chunk_size,
    partition,
):
    """y as in `parallel`, and the final state or None, from `state` (None: from zero)."""
    from pallas_kernels.chunked.attention import CHUNK, ChunkedAttention, StateArrays, chunked_attention
    from pallas_kernels.quadratic.attention import Attention

    inside = Attention(op.score, op.normalize, op.query_scale, op.denominator_floor)
    spec = ChunkedAttention(inside, chunk_size or CHUNK, final_state=return_final_state)
    if state is not None:
        state = StateArrays(*(x.astype(jnp.float32) for x in state))
    call = functools.partial(chunked_attention, spec)
    y, final = _spread(call, partition, (q, k, v), log_decay, run, state, returns_state=True)
    return y, FiniteState(*final) if return_final_state else None


def _spread(call, partition: PartitionSpec | None, arrays, log_decay, run, *state, returns_state=False):
    """call(*arrays, log_decay, run, *state); where a mesh is set, on each device with its batch entries and heads."""
    if log_decay is not None:
        log_decay = log_decay.astype(jnp.float32)
    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return call(*arrays, log_decay, run, *state)
    batch, _, heads, *_ = (*partition, None, None, None)
    array, of_state = PartitionSpec(batch, None, heads), PartitionSpec(batch, heads)
    specs = [array] * 3 + [None if log_decay is None else array, None if run is None else PartitionSpec(batch)]
    specs += [None if x is None else of_state for x in state]
    out_specs = (array, of_state) if returns_state else array
    spread = jax.shard_map(call, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)
    return spread(*arrays, log_decay, run, *state)


def _size(axes) -> int:
    """How many devices the mesh axes spread an array's axis over."""
    shape = jax.sharding.get_abstract_mesh().shape
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    size = 1
    for name in names:
        size *= shape.get(name, 1)
    return size
