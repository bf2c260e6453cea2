"""The GPU kernels as an implementation of the operation: when they can compute a call, and how they are spread."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.device import device_kind, unsupported_device
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.state import FiniteState, LayerState

Implementation = Literal["xla", "mosaic_gpu"]
IMPLEMENTATIONS = ("xla", "mosaic_gpu")
MOSAIC_GPU = "mosaic_gpu"

# Tokens up to which the quadratic kernels are faster on one H200 than XLA's chunked form, forward and backward together
# (docs/kernels.md).
LONGEST = {"linear": 16384, "squared": 131072, "exp": sys.maxsize}


_log = logging.getLogger("twomamba_jax")


def choose(implementation: Implementation | None, form: str, unsupported: Callable) -> Implementation:
    """The implementation named, or for None the kernels where they can compute the call; that is logged once.

    `unsupported(form)` is the reason why they cannot, or None. Raises ValueError for an unknown implementation, and for
    kernels that are named and cannot.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: expected None or one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "xla":
        return implementation
    reason = unsupported(form)
    if implementation == MOSAIC_GPU:
        if reason:
            raise ValueError(f"implementation='mosaic_gpu' cannot compute this call: {reason}; use 'xla', or None")
        return implementation
    _log_choice(form, "xla" if reason else MOSAIC_GPU, reason)
    return "xla" if reason else MOSAIC_GPU


@functools.cache
def _log_choice(form, implementation, reason) -> None:
    """Says once what None chose, for each form and reason."""
    why = f" (mosaic_gpu: {reason})" if reason else ""
    _log.info("decay_attention: form=%s, implementation=%s%s", form, implementation, why)


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


def unsupported_in_cache(q, k, state: FiniteState | LayerState, form) -> str | None:
    """Why the kernels cannot read the state for these new tokens here, or None if they can."""
    if reason := unsupported_device():
        return reason
    if q.shape[1] > 1:
        return f"it reads a state for one token at a time, and these are {q.shape[1]}"
    from pallas_kernels.query_step import unsupported as unsupported_state

    return unsupported_state(_in_stack(state).stack.kv, q.shape[2] // k.shape[2])


def read_state(state: FiniteState | LayerState, partition: PartitionSpec | None, phi):
    """phi^T kv [B, G, R, 1, V] for features [B, G, R, 1, D]; spread as in `parallel`."""
    from pallas_kernels.query_step import query_step

    state, phi = _in_stack(state), phi[:, :, :, 0]
    arguments = state.stack.kv, state.layer, phi
    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return query_step(*arguments)[:, :, :, None]
    batch, _, heads, *_ = (*partition, None, None, None)
    array = PartitionSpec(batch, heads)
    specs = (PartitionSpec(None, batch, heads), PartitionSpec(), array)
    return jax.shard_map(query_step, in_specs=specs, out_specs=array, check_vma=False)(*arguments)[:, :, :, None]


def _in_stack(state: FiniteState | LayerState) -> LayerState:
    """A state alone as a stack of one."""
    return state if isinstance(state, LayerState) else LayerState(jax.tree.map(lambda x: x[None], state), jnp.int32(0))


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
