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
from twomamba_jax.ops.decoding import recurrent_cache
from twomamba_jax.ops.decoding.recurrent_cache import LayerCache, RecurrentCache
from twomamba_jax.ops.forms.stages import not_negative
from twomamba_jax.ops.numerics import divide
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.padded_heads import cut_state, pad_arrays, pad_state
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import FiniteState

Implementation = Literal["xla", "mosaic_gpu"]
IMPLEMENTATIONS = ("xla", "mosaic_gpu")
MOSAIC_GPU = "mosaic_gpu"

# Tokens up to which the quadratic kernels are faster on one H200 than XLA's chunked form, forward and backward together
# (docs/kernels.md), where that and not a chunked kernel is what they compete with.
LONGEST = {"linear": 16384, "squared": 131072, "exp": sys.maxsize}

SPILLING_JAX = (0, 12)  # from this version on kernels spill (docs/kernels.md)

_log = logging.getLogger("twomamba_jax")


def choose(implementation: Implementation | None, form: str, unsupported: Callable) -> Implementation:
    """The implementation named, or for None the kernels where they can compute the call; that is logged once.

    `unsupported(form)` is the reason why they cannot, or None. Raises ValueError for an unknown implementation, and for
    kernels that are named and cannot.
    """
    check_name(implementation)
    if implementation == "xla":
        return implementation
    reason = unsupported(form)
    if implementation == MOSAIC_GPU:
        if reason:
            raise ValueError(f"implementation='mosaic_gpu' cannot compute this call: {reason}; use 'xla', or None")
        return implementation
    _log_choice(form, "xla" if reason else MOSAIC_GPU, reason)
    return "xla" if reason else MOSAIC_GPU


def check_name(implementation: Implementation | None) -> None:
    """Raises ValueError for an implementation that there is not."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: expected None or one of {', '.join(IMPLEMENTATIONS)}"
        )


@functools.cache
def _log_choice(form, implementation, reason) -> None:
    """Says once what None chose, for each form and reason."""
    why = f" (mosaic_gpu: {reason})" if reason else ""
    _log.info("decay_attention: form=%s, implementation=%s%s", form, implementation, why)
    if implementation == MOSAIC_GPU and jax.default_backend() == "gpu" and jax.__version_info__ >= SPILLING_JAX:
        _log.warning("JAX %s compiles the kernels with spilled registers: take JAX 0.11.2", jax.__version__)


def unsupported(op: Operation, q, k, v, initial_state, axis: SequenceAxis | None, chunk_size, form) -> str | None:
    """Why the kernels cannot compute this call here, or None if they can.

    What is heavy to import, and not there on every platform, is imported where there is a device for it.
    """
    if reason := unsupported_device():
        return reason
    if form not in ("parallel", "chunked"):
        return f"it has the parallel and the chunked form, and this is form={form!r}"
    q, k, v = jax.eval_shape(pad_arrays, q, k, v)
    if form == "parallel" and initial_state is not None:
        return "it takes no initial_state in the parallel form"
    if form == "parallel" and axis is not None:
        return f"it needs all tokens of a sequence on one device in the parallel form, and {axis.name!r} spreads them"
    from pallas_kernels.quadratic.attention import unsupported as unsupported_call

    if reason := unsupported_call(q, k, v, score=op.score, precision=op.precision):
        return reason
    if form == "parallel":
        return None
    from pallas_kernels.chunked.attention import unsupported as unsupported_in_chunks

    return unsupported_in_chunks(q, score=op.score, chunk_size=chunk_size)


def crossover(op: Operation, q, v) -> int:
    """Tokens up to which the quadratic kernels are faster than the chunked ones, forward and backward together."""
    from pallas_kernels.chunked.table import crossover as measured

    return measured(device_kind(), op.score, max(q.shape[3], v.shape[3]), "forward+backward", q.shape[0] * q.shape[2])


def attend(
    op: Operation,
    form,
    chunk_size: int | None,
    return_final_state: bool,
    q,
    k,
    v,
    log_decay,
    run,
    state: FiniteState | None,
    axis: SequenceAxis | None,
):
    """y [B, T, H, V] in q's dtype, and the final state if it is wanted and the form computes it, or None.

    A call for `spread`, of arrays [B, T, heads, dim].
    """
    head_dim, value_dim = k.shape[3], v.shape[3]
    call = functools.partial(_attend, op, form, chunk_size, return_final_state)
    if head_dim == value_dim:
        return call(q, k, v, log_decay, run, state, axis)
    state = None if state is None else pad_state(op.score, head_dim, state)
    y, final = call(*pad_arrays(q, k, v), log_decay, run, state, axis)
    return y[..., :value_dim], None if final is None else cut_state(op.score, head_dim, value_dim, final)


def _attend(op: Operation, form, chunk_size, return_final_state, q, k, v, log_decay, run, state, axis):
    """`attend` with K = V."""
    from pallas_kernels.quadratic.attention import Attention, attention

    inside = Attention(op.score, op.normalize, op.query_scale, op.denominator_floor)
    log_decay = None if log_decay is None else log_decay.astype(jnp.float32)
    if form == "parallel":
        return attention(inside, q, k, v, log_decay, run), None
    from pallas_kernels.chunked.attention import ChunkedAttention, StateArrays, chunked_attention

    enter = None if axis is None else axis.enter
    spec = ChunkedAttention(inside, chunk_size, final_state=return_final_state, enter=enter)
    if state is not None:
        state = StateArrays(*(x.astype(jnp.float32) for x in state))
        state = state if axis is None else axis.first(state)
    y, final = chunked_attention(spec, q, k, v, log_decay, run, state)
    if not return_final_state:
        return y, None
    final = FiniteState(*final)
    return y, final if axis is None else axis.last(final)


def unsupported_in_cache(q, k, state: FiniteState, form) -> str | None:
    """Why the kernels cannot attend to a cache with this state for these new tokens here, or None if they can."""
    if reason := unsupported_device():
        return reason
    if q.shape[1] > 1:
        return f"it attends to a cache for one token at a time, and these are {q.shape[1]}"
    from pallas_kernels.decoding.step import unsupported as unsupported_step

    return unsupported_step(q, state.kv, q.shape[2] // k.shape[2])


def attend_in_cache(op: Operation, q, k, v, log_decay, cache: RecurrentCache | LayerCache, partition):
    """`recurrent_cache.attend` for one token; spread over the batch and heads of `partition`.

    New keys and values are rounded to the cache's dtype before they are attended to.
    """
    cache = _in_stack(cache)
    from pallas_kernels.decoding.step import DecodeStep, decode_step, padded

    spec, stack = DecodeStep(op.score, op.normalize, op.query_scale), cache.stack
    decays = recurrent_cache.waiting_decays(log_decay, cache.take(), padded(stack.keys.shape[3]))
    key, value = k[:, :, 0].astype(stack.keys.dtype), v[:, :, 0].astype(stack.values.dtype)
    of_layers = *stack.state, stack.keys, stack.values, stack.folded, stack.length

    def attend(layer, of_layers, of_token):
        numerator, *denominators = jnp.moveaxis(decode_step(spec, layer, *of_layers, *of_token).sum(0), 3, 0)
        if not denominators:
            return numerator[:, :, :, None]
        through_state, of_ring = denominators
        denominator = not_negative(through_state) + of_ring
        return divide(numerator[..., None], denominator, op.denominator_floor)[:, :, :, None, :, 0]

    return _spread(attend, partition, cache.layer, of_layers, (q[:, :, :, 0], key, value, decays))


def _in_stack(cache: RecurrentCache | LayerCache) -> LayerCache:
    """A cache alone as a stack of one."""
    if isinstance(cache, LayerCache):
        return cache
    return LayerCache(jax.tree.map(lambda x: x[None], cache._replace(previous=None)), jnp.int32(0))


def _spread(call: Callable, partition: PartitionSpec | None, layer, of_layers, of_token):
    """call(layer, of_layers, of_token) -> [B, G, ...]; arrays [L, B, G, ...] or [L, B], and [B, G, ...]."""
    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return call(layer, of_layers, of_token)
    batch, _, heads, *_ = (*partition, None, None, None)
    array, in_stack = PartitionSpec(batch, heads), PartitionSpec(None, batch, heads)
    of_stack = tuple(in_stack if x.ndim > 2 else PartitionSpec(None, batch) for x in of_layers)
    specs = PartitionSpec(), of_stack, (array,) * len(of_token)
    return jax.shard_map(call, in_specs=specs, out_specs=array, check_vma=False)(layer, of_layers, of_token)


def unsupported_fold(kv, keys, values, size: int) -> str | None:
    """Why the kernel cannot fold `size` tokens of these rings into these states here, or None if it can."""
    if reason := unsupported_device():
        return reason
    from pallas_kernels.decoding.fold import unsupported as unsupported_tokens

    return unsupported_tokens(kv, keys, values, size)


def fold(op: Operation, *arguments):
    """(state, previous) of a stack of layers after the tokens; arguments as in `pallas_kernels.decoding.fold`."""
    from pallas_kernels.decoding.fold import fold as fold_tokens

    return fold_tokens(op.score, *arguments)
