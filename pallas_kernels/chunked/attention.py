"""Attention with finite scores in chunks, as kernels with gradients.

A chunk attends to itself with the quadratic kernels and to the state before it with the kernels of this package; what
it adds to the state depends on the chunk alone. States are recomputed in the backward pass.

    forward   S_c = keep_c S_{c-1} + sum_j reach_j phi(k_j) v_j^T,    y_i = (n'_i y'_i + through_i S^T phi(q_i)) / n_i
    backward  dS_{c-1} = keep_c dS_c + sum_i phi(q_i) u_i^T,          u_i = through_i dy_i / n_i
              dq_i += J(q_i)^T S_{c-1} u_i,   dk_j += reach_j J(k_j)^T dS_c v_j,   dv_j += reach_j dS_c^T phi(k_j)

with y', n' the outputs and row sums inside the chunk and J the derivative of phi. The normaliser z = sum_j reach_j
phi(k_j) is a state whose values are 1; what reaches it is -<dy_i, y_i> through_i / n_i. The `Stages` of a score compute
what depends on phi.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunked.decays import TILE, Weights, chunk_weights, decay_gradient
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.stages import Stages, StateArrays, States
from pallas_kernels.device import in_32_bits
from pallas_kernels.interpreter import interpreting
from pallas_kernels.quadratic.attention import Attention, attend, differentiate
from pallas_kernels.quadratic.context import Context
from pallas_kernels.quadratic.operands import Decay
from pallas_kernels.residuals import STATES, named, named_small


@dataclasses.dataclass(frozen=True)
class ChunkedAttention:
    """What to compute, apart from the arrays.

    Attributes:
      inside: the attention inside a chunk.
      stages: of its score.
      chunk: tokens of a chunk, a multiple of what the score asks for; shorter sequences are one chunk. None: the
        score's own.
      tiles: how the kernels cut a chunk; None: as the stages say.
      final_state: whether to return the state after the last token.
      enter: where devices share a sequence, the function (weights, added, initial, reverse) -> the state before this
        device's first step, of N steps S_c = weights_c S_{c-1} + added_c on every device; weights are [N, B, G], the
        others pytrees of arrays [(N,) B, G, ...], and `initial` is the state before the steps of all. None: one device.
    """

    inside: Attention
    stages: Stages
    chunk: int | None = None
    tiles: Any = None
    final_state: bool = True
    enter: Callable | None = None

    def problem(self, batch: int, tokens: int, heads: int, groups: int) -> Problem:
        """What the stages are told of a call."""
        tiles = self.tiles or self.stages.tiles
        return Problem(batch, tokens, heads, groups, self.chunk_of(tokens), tiles, interpreting())

    def chunk_of(self, tokens: int) -> int:
        """Tokens of a chunk of a sequence of `tokens`."""
        multiple = self.stages.multiple(self.tiles or self.stages.tiles)
        return min(self.chunk or self.stages.chunk, -(-tokens // multiple) * multiple)


def unsupported(of_scores: Mapping[str, Stages], q, *, score: str, chunk_size: int | None) -> str | None:
    """Why kernels with these stages cannot compute a call that the quadratic ones can in their chunks, or None."""
    if score not in of_scores:
        return f"in chunks it has {' and '.join(of_scores)} scores only, got {score!r}"
    stages = of_scores[score]
    if q.shape[-1] not in stages.head_dims:
        dims = " and ".join(map(str, stages.head_dims))
        return f"in chunks it has a head dim of {dims} only for score={score!r}, got {q.shape[-1]}"
    multiple = stages.multiple(stages.tiles)
    if chunk_size is not None and chunk_size % multiple:
        return f"its chunks have a multiple of {multiple} tokens for score={score!r}, got chunk_size={chunk_size}"
    return None


def chunked_attention(spec: ChunkedAttention, q, k, v, log_decay, segment, initial: StateArrays | None):
    """y [B, T, H, V] bfloat16 and the state after the last token, or None; differentiable in all arrays but `segment`.

    Args:
      spec: what to compute.
      q: [B, T, H, K] bfloat16; k, v: [B, T, G, K] bfloat16, with H a multiple of G and K one of the score's head dims.
      log_decay: [B, T, G] float32, not positive and not below -128; None: no decay.
      segment: [B, T] int32, the number of each token's segment in its row, ascending from the state's, 0; None: one
        segment.
      initial: the state before the first token; None: nothing. With `spec.enter` only the first device's counts, whose
        gradient is its own. The state that is returned is then that after this device's tokens; only the last device's
        may be differentiated.
    """
    tokens = q.shape[1]
    if padding := -tokens % spec.chunk_of(tokens):
        # Zero keys and no decay change no state.
        def pad(x, mode="constant"):
            return None if x is None else jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)

        q, k, v, log_decay, segment = pad(q), pad(k), pad(v), pad(log_decay), pad(segment, "edge")
    y, final = _attention(spec, q, k, v, log_decay, segment, initial)
    return y[:, :tokens], final


class _Around(NamedTuple):
    """What both directions are told of decays and segments: inside the chunks, and between them."""

    inside: Context
    weights: Weights


@in_32_bits
def _around(spec, q, k, log_decay, segment) -> _Around:
    batch, tokens, groups, chunk = *k.shape[:3], spec.chunk_of(q.shape[1])
    split = functools.partial(_split, chunk)
    inside = Context.make(split(log_decay), split(segment), spec.inside.tiles(split(q)))
    decay = None if log_decay is None else inside.decays.get(TILE) or Decay.make(split(log_decay), TILE)
    return _Around(inside, chunk_weights(decay, segment, (batch, tokens, groups), chunk))


def _problems(spec, q, k) -> list[Problem]:
    """Of the queries' heads and of the keys'."""
    batch, tokens, heads, _ = q.shape
    return [spec.problem(batch, tokens, n, k.shape[2]) for n in (heads, k.shape[2])]


def _states(spec: ChunkedAttention, added, keep, initial: StateArrays | None, **options):
    """As `Stages.scan`, from and to a state that are `StateArrays`; with `spec.enter` from what that makes of it."""
    first = None if initial is None else spec.stages.pack(initial)
    if spec.enter is not None:
        steps = [jnp.moveaxis(x, 2, 0) for x in (keep, *added)]
        first = spec.enter(steps[0], tuple(steps[1:]), first, options.get("reverse", False))
    states, final, inner = spec.stages.scan(added, keep, first, **options)
    return states, spec.stages.unpack(*final), inner


def _split(chunk, x):
    """[B, T, ...] -> [B N, C, ...]."""
    return None if x is None else x.reshape(-1, chunk, *x.shape[2:])


def _join(batch, x):
    """[B N, heads, C] -> [B, heads, T]."""
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2).reshape(batch, x.shape[1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: ChunkedAttention, q, k, v, log_decay, segment, initial):
    y, final, *_ = _forward(spec, q, k, v, _around(spec, q, k, log_decay, segment), initial)
    return y, final


def _attention_forward(spec: ChunkedAttention, q, k, v, log_decay, segment, initial):
    around = named_small(_around(spec, q, k, log_decay, segment))
    y, final, norm, states = _forward(spec, q, k, v, around, initial)
    y, norm = named(y, norm)
    return (y, final), (q, k, v, around, initial, y, norm, states)


@in_32_bits
def _forward(spec: ChunkedAttention, q, k, v, around: _Around, initial):
    batch, inside, stages, weights = q.shape[0], spec.inside.problem(q, k), spec.stages, around.weights
    queries, keys = _problems(spec, q, k)
    split = functools.partial(_split, queries.chunk)
    y, norm = attend(spec.inside, *map(split, (q, k, v)), around.inside, save_norm=inside.normalize)
    added = stages.add(keys, k, v, weights.reach, weights.reach)
    states, final, _ = _states(spec, added, weights.keep, initial)
    states = States(*named(*states, name=STATES))
    through, own = weights.through, {}
    if inside.normalize:
        own = {"own_norm": _join(batch, norm), "floor": inside.floor}
    elif inside.output_scale != 1:
        shape = (batch, k.shape[2], q.shape[1])
        through = jnp.broadcast_to(inside.output_scale * (1.0 if through is None else through), shape)
    y = stages.query(queries, q, states, through, y.reshape(q.shape), power=inside.query_power, **own)
    y, norm = y if inside.normalize else (y, None)
    return y, final if spec.final_state else None, norm, states


@in_32_bits
def _attention_backward(spec: ChunkedAttention, saved, cotangents):
    q, k, v, around, initial, y, norm, states = saved
    dy, dfinal = cotangents
    batch, inside, stages, weights = q.shape[0], spec.inside.problem(q, k), spec.stages, around.weights
    queries, keys = _problems(spec, q, k)
    chunk, keep, reach = queries.chunk, weights.keep, weights.reach
    split = functools.partial(_split, chunk)

    # What reaches the states and the normalisers, with the scale that is left out of the features.
    shape = batch, q.shape[2], q.shape[1]
    through = jnp.full(shape, inside.query_power**stages.degree * inside.output_scale, jnp.float32)
    if weights.through is not None:
        through = through * jnp.repeat(weights.through, queries.repeats, axis=1)
    to_normalizer = jnp.zeros(shape, jnp.float32)
    if inside.normalize:
        through = through * jnp.exp2(-norm)
        to_normalizer = -jnp.einsum("bthv,bthv->bht", dy, y, preferred_element_type=jnp.float32) * through
    added = stages.add(queries, q, dy, through, to_normalizer)
    has_decay, has_normalizer = around.inside.decays is not None, inside.normalize or spec.final_state
    products = {"other": states if has_decay else None, "with_normalizer": has_normalizer}
    dstates, dinitial, inner = _states(spec, added, keep, dfinal, reverse=True, **products)

    norms = None if norm is None else jnp.moveaxis(norm.reshape(*norm.shape[:2], -1, chunk), 2, 1)
    norms = None if norm is None else norms.reshape(-1, *norms.shape[2:])
    inputs = *map(split, (q, k, v)), around.inside, split(y), norms, split(dy)
    dq, dk, dv, dlog_decay = differentiate(spec.inside, *inputs)
    dq, dk, dv = dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
    dv = stages.query(keys, k, dstates, reach, dv)
    ones = jnp.ones((batch, k.shape[2], k.shape[1]), jnp.float32)
    of_rows, of_columns = to_normalizer, ones if reach is None else reach
    of_rows, of_columns = of_rows if inside.normalize else None, of_columns if has_normalizer else None
    dq, *rows = stages.gradient(queries, q, dy, through, states, dq, of_rows, has_decay)
    dk, *columns = stages.gradient(keys, k, v, reach, dstates, dk, of_columns, has_decay)
    if has_decay:
        row_sums = rows[0].reshape(batch, k.shape[2], -1, q.shape[1]).sum(2)
        dlog_decay = dlog_decay.reshape(*k.shape[:2], -1) + decay_gradient(row_sums, columns[0], keep * inner, chunk)
    return dq, dk, dv, dlog_decay, None, None if initial is None else dinitial


_attention.defvjp(_attention_forward, _attention_backward)
