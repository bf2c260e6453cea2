"""Kernels as an implementation of the operation: when they can compute a call, and how.

Nothing here is of one language: `ops.mosaic_gpu` and `ops.triton` say which kernels there are in theirs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.chunked import attention as chunked
from pallas_kernels.chunked.stages import Stages
from pallas_kernels.quadratic import attention as quadratic
from twomamba_jax.ops.decoding import recurrent_cache
from twomamba_jax.ops.decoding.recurrent_cache import RecurrentCache, take_layer
from twomamba_jax.ops.forms.stages import not_negative
from twomamba_jax.ops.numerics import divide
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.padded_heads import cut_state, pad_arrays, pad_state
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import FiniteState


@dataclasses.dataclass(frozen=True)
class Kernels:
    """All kernels in one language.

    Attributes:
      quadratic: of the parallel form, and of the inside of chunks.
      stages: of the chunked form, by score.
      step: the module of the decoding step: `DecodeStep`, `unsupported`, `padded`, `decode_step`.
      folding: the module of the fold: `unsupported`, `fold`.
      elementwise: the modules of what stands between products, by what it is of: `unsupported`, and a function.
      longest: by score, the tokens up to which the quadratic kernels are faster than XLA's chunked form.
      crossover: (score, head dim, B H) -> the tokens up to which they are faster than the chunked kernels. All of
        forward and backward together.
    """

    quadratic: quadratic.Kernels
    stages: Mapping[str, Stages]
    step: Any
    folding: Any
    elementwise: Mapping[str, Any]
    longest: Mapping[str, int]
    crossover: Callable[[str, int, int], int]

    def unsupported(
        self, op: Operation, q, k, v, initial_state, axis: SequenceAxis | None, chunk_size, form
    ) -> str | None:
        """Why the kernels cannot compute this call, on a device that has them, or None if they can."""
        if form not in ("parallel", "chunked"):
            return f"it has the parallel and the chunked form, and this is form={form!r}"
        q, k, v = jax.eval_shape(pad_arrays, q, k, v)
        if form == "parallel" and initial_state is not None:
            return "it takes no initial_state in the parallel form"
        if form == "parallel" and axis is not None:
            return (
                f"it needs all tokens of a sequence on one device in the parallel form, and {axis.name!r} shards them"
            )
        rules = {"score": op.score, "normalize": op.normalize, "precision": op.precision}
        if reason := quadratic.unsupported(self.quadratic, q, k, v, **rules):
            return reason
        if form == "parallel":
            return None
        return chunked.unsupported(self.stages, q, score=op.score, chunk_size=chunk_size)

    def longest_parallel(self, op: Operation, q, v, in_chunks: bool) -> int:
        """Tokens up to which the quadratic kernels are the fastest, forward and backward together.

        `in_chunks`: whether the chunked kernels can compute the call, too; else XLA's chunked form is the other.
        """
        if not in_chunks:
            return self.longest[op.score]
        return self.crossover(op.score, max(q.shape[3], v.shape[3]), q.shape[0] * q.shape[2])

    def attend(
        self,
        op: Operation,
        form,
        chunk_size: int | None,
        return_final_state: bool,
        q,
        k,
        v,
        log_decay,
        segment,
        state: FiniteState | None,
        axis: SequenceAxis | None,
    ):
        """y [B, T, H, V] in q's dtype, and the final state if it is wanted and the form computes it, or None.

        A call for `shard_call`, of arrays [B, T, heads, dim].
        """
        head_dim, value_dim = k.shape[3], v.shape[3]
        call = functools.partial(self._attend, op, form, chunk_size, return_final_state)
        if head_dim == value_dim:
            return call(q, k, v, log_decay, segment, state, axis)
        state = None if state is None else pad_state(op.score, head_dim, state)
        y, final = call(*pad_arrays(q, k, v), log_decay, segment, state, axis)
        return y[..., :value_dim], None if final is None else cut_state(op.score, head_dim, value_dim, final)

    def _attend(self, op: Operation, form, chunk_size, return_final_state, q, k, v, log_decay, segment, state, axis):
        """`attend` with K = V."""
        inside = quadratic.Attention(self.quadratic, op.score, op.normalize, op.query_scale, op.denominator_floor)
        log_decay = None if log_decay is None else log_decay.astype(jnp.float32)
        if form == "parallel":
            return quadratic.attention(inside, q, k, v, log_decay, segment), None
        enter = None if axis is None else axis.enter
        stages = self.stages[op.score]
        spec = chunked.ChunkedAttention(inside, stages, chunk_size, final_state=return_final_state, enter=enter)
        if state is not None:
            state = chunked.StateArrays(*(x.astype(jnp.float32) for x in state))
            state = state if axis is None else axis.first(state)
        y, final = chunked.chunked_attention(spec, q, k, v, log_decay, segment, state)
        if not return_final_state:
            return y, None
        final = FiniteState(*final)
        return y, final if axis is None else axis.last(final)

    def unsupported_in_cache(self, q, k, state: FiniteState) -> str | None:
        """Why the kernels cannot attend to a cache with this state for these new tokens, or None if they can."""
        if q.shape[1] > 1:
            return f"it attends to a cache for one token at a time, and these are {q.shape[1]}"
        return self.step.unsupported(q, state.kv, q.shape[2] // k.shape[2])

    def read_cache(self, op: Operation, q, k, v, log_decay, cache: RecurrentCache, layer, partition):
        """`recurrent_cache.read` for one token; sharded over the batch and heads of `partition`.

        `layer` is as in `cached_attention.read`. New keys and values are rounded to the cache's dtype before they are
        attended to.
        """
        stack = cache
        if layer is None:
            stack, layer = jax.tree.map(lambda x: x[None], cache._replace(previous=None)), jnp.int32(0)
        spec = self.step.DecodeStep(op.score, op.normalize, op.query_scale)
        size = self.step.padded(stack.keys.shape[3])
        decays = recurrent_cache.waiting_decays(log_decay, take_layer(stack, layer), size)
        key, value = k[:, :, 0].astype(stack.keys.dtype), v[:, :, 0].astype(stack.values.dtype)
        of_layers = *stack.state, stack.keys, stack.values, stack.folded, stack.length

        def attend(layer, of_layers, of_token):
            parts = self.step.decode_step(spec, layer, *of_layers, *of_token)
            numerator, *denominators = jnp.moveaxis(parts.sum(0), 3, 0)
            if not denominators:
                return numerator[:, :, :, None]
            through_state, of_ring = denominators
            denominator = not_negative(through_state) + of_ring
            return divide(numerator[..., None], denominator, op.denominator_floor)[:, :, :, None, :, 0]

        return _sharded(attend, partition, layer, of_layers, (q[:, :, :, 0], key, value, decays))

    def unsupported_fold(self, kv, keys, values, size: int) -> str | None:
        """Why the kernel cannot fold `size` tokens of these rings into these states, or None if it can."""
        return self.folding.unsupported(kv, keys, values, size)

    def fold(self, op: Operation, *arguments):
        """(state, previous) of a stack of layers after the tokens; arguments as in `pallas_kernels.decoding.fold`."""
        return self.folding.fold(op.score, *arguments)


def _sharded(call: Callable, partition: PartitionSpec | None, layer, of_layers, of_token):
    """call(layer, of_layers, of_token) -> [B, G, ...]; arrays [L, B, G, ...] or [L, B], and [B, G, ...]."""
    if partition is None or jax.sharding.get_abstract_mesh().empty:
        return call(layer, of_layers, of_token)
    batch, _, heads, *_ = (*partition, None, None, None)
    array, in_stack = PartitionSpec(batch, heads), PartitionSpec(None, batch, heads)
    of_stack = tuple(in_stack if x.ndim > 2 else PartitionSpec(None, batch) for x in of_layers)
    specs = PartitionSpec(), of_stack, (array,) * len(of_token)
    return jax.shard_map(call, in_specs=specs, out_specs=array, check_vma=False)(layer, of_layers, of_token)
