"""Attention with squared scores in chunks, as kernels with gradients.

A chunk attends to itself with the quadratic kernels and to the state before it with the kernels of this package; what
it adds to the state depends on the chunk alone. States are recomputed in the backward pass.

    forward   S_c = keep_c S_{c-1} + sum_j reach_j phi(k_j) v_j^T,    y_i = (n'_i y'_i + through_i S^T phi(q_i)) / n_i
    backward  dS_{c-1} = keep_c dS_c + sum_i phi(q_i) u_i^T,          u_i = through_i dy_i / n_i
              dq_i += 2 Mat(S_{c-1} u_i) q_i,   dk_j += 2 reach_j Mat(dS_c v_j) k_j,   dv_j += reach_j dS_c^T phi(k_j)

with y', n' the outputs and row sums inside the chunk. The normaliser Z = sum_j reach_j k_j k_j^T is a state whose
values are 1; what reaches it is -<dy_i, y_i> through_i / n_i.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunked.decays import chunk_weights, decay_gradient
from pallas_kernels.chunked.gradient import gradient
from pallas_kernels.chunked.layout import (
    HEAD_DIM,
    multiplicity,
    pack,
    pack_normalizer,
    unpack,
    unpack_normalizer,
)
from pallas_kernels.chunked.normalizer import normalizer
from pallas_kernels.chunked.problem import CHUNK, Problem, Tiles
from pallas_kernels.chunked.query import query
from pallas_kernels.chunked.scan import scan
from pallas_kernels.chunked.update import update
from pallas_kernels.device import in_32_bits
from pallas_kernels.interpreter import interpreting
from pallas_kernels.quadratic.attention import Attention, attend, differentiate


class StateArrays(NamedTuple):
    """The public state: kv [B, G, 2080, V] and key_sum [B, G, 2080], float32."""

    kv: jax.Array
    key_sum: jax.Array


@dataclasses.dataclass(frozen=True)
class ChunkedAttention:
    """What to compute, apart from the arrays.

    Attributes:
      inside: the attention inside a chunk, of squared scores.
      chunk: tokens of a chunk, a multiple of `tiles.rows`; shorter sequences are one chunk.
      tiles: how the kernels cut a chunk.
      final_state: whether to return the state after the last token.
      enter: where devices share a sequence, the function (weights, added, initial, reverse) -> the state before this
        device's first step, of N steps S_c = weights_c S_{c-1} + added_c on every device; weights are [N, B, G], the
        others pytrees of arrays [(N,) B, G, ...], and `initial` is the state before the steps of all. None: one device.
    """

    inside: Attention
    chunk: int = CHUNK
    tiles: Tiles = dataclasses.field(default_factory=Tiles)
    final_state: bool = True
    enter: Callable | None = None

    def chunk_of(self, tokens: int) -> int:
        """Tokens of a chunk of a sequence of `tokens`."""
        rows = self.tiles.rows
        return min(self.chunk, -(-tokens // rows) * rows)


def unsupported(q, *, score: str, chunk_size: int | None) -> str | None:
    """Why these kernels cannot compute a call that the quadratic ones can compute in their chunks, or None."""
    if score != "squared":
        return f"in chunks it has squared scores only, got {score!r}"
    if q.shape[-1] != HEAD_DIM:
        return f"in chunks it has a head dim of {HEAD_DIM} only, got {q.shape[-1]}"
    rows = Tiles().rows
    if chunk_size is not None and chunk_size % rows:
        return f"its chunks have a multiple of {rows} tokens, got chunk_size={chunk_size}"
    return None


def chunked_attention(spec: ChunkedAttention, q, k, v, log_decay, run, initial: StateArrays | None):
    """y [B, T, H, 64] bfloat16 and the state after the last token, or None; differentiable in all arrays but `run`.

    Args:
      spec: what to compute.
      q: [B, T, H, 64] bfloat16; k, v: [B, T, G, 64] bfloat16, with H a multiple of G.
      log_decay: [B, T, G] float32, not positive and not below -128; None: no decay.
      run: [B, T] int32, the number of each token's segment in its row, ascending from the state's, 0; None: one
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

        q, k, v, log_decay, run = pad(q), pad(k), pad(v), pad(log_decay), pad(run, "edge")
    y, final = _attention(spec, q, k, v, log_decay, run, initial)
    return y[:, :tokens], final


class _Call(NamedTuple):
    """What both directions need of a call."""

    queries: Problem
    keys: Problem
    weights: tuple
    values: jax.Array  # reach v


class _States(NamedTuple):
    """States, and normalisers as sums of two bfloat16 matrices, before each chunk; and after the last, float32."""

    kv: jax.Array
    normalizer: jax.Array
    final_kv: jax.Array
    final_normalizer: jax.Array


def _call(spec, q, k, v, log_decay, run) -> _Call:
    batch, tokens, heads, _ = q.shape
    groups = k.shape[2]
    chunk = spec.chunk_of(tokens)
    problems = [Problem(batch, tokens, n, groups, chunk, spec.tiles, interpreting()) for n in (heads, groups)]
    weights = chunk_weights(log_decay, run, (batch, tokens, groups), chunk)
    return _Call(*problems, weights, _scaled(v, weights.reach))


def _states(enter, problem: Problem, x, values, factor, keep, initial: StateArrays | None, reverse=False) -> _States:
    """The states that (x, values) and (x, factor) make, from `initial`, or from what `enter` makes of it."""
    added, added_z = update(problem, x, values), normalizer(problem, x, factor)[:, :, :, None]
    first = None
    if initial is not None:
        first = pack(initial.kv), pack_normalizer(initial.key_sum)[:, :, None]
    if enter is not None:
        steps = [jnp.moveaxis(x, 2, 0) for x in (keep, added, added_z)]
        first = enter(steps[0], tuple(steps[1:]), first, reverse)
    kv, z = first or (None, None)
    before, final = scan(added, keep, kv, reverse=reverse)
    before_z, final_z = scan(added_z, keep, z, reverse=reverse, dtype=jnp.float32)
    return _States(before, jnp.stack(_high_and_low(before_z[:, :, :, 0]), axis=3), final, final_z[:, :, 0])


def _public(states: _States) -> StateArrays:
    """The state after the last chunk."""
    return StateArrays(unpack(states.final_kv), unpack_normalizer(states.final_normalizer))


def _high_and_low(x):
    """x as a sum of two bfloat16 arrays; the compiler may drop conversions there and back, not `reduce_precision`."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _scaled(x, *factors):
    """x [B, T, heads, dim] times factors [B, G or heads, T] (None: 1), in x's dtype."""
    factors = [factor for factor in factors if factor is not None]
    if not factors:
        return x
    heads = x.shape[2]
    product = functools.reduce(jnp.multiply, [jnp.repeat(f, heads // f.shape[1], axis=1) for f in factors])
    return (x.astype(jnp.float32) * jnp.moveaxis(product, 1, 2)[..., None]).astype(x.dtype)


def _split(chunk, x):
    """[B, T, ...] -> [B N, C, ...]."""
    return None if x is None else x.reshape(-1, chunk, *x.shape[2:])


def _join(batch, x):
    """[B N, heads, C] -> [B, heads, T]."""
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2).reshape(batch, x.shape[1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: ChunkedAttention, q, k, v, log_decay, run, initial):
    return _forward(spec, q, k, v, log_decay, run, initial)[:2]


def _attention_forward(spec: ChunkedAttention, q, k, v, log_decay, run, initial):
    y, final, norm = _forward(spec, q, k, v, log_decay, run, initial)
    return (y, final), (q, k, v, log_decay, run, initial, y, norm)


@in_32_bits
def _forward(spec: ChunkedAttention, q, k, v, log_decay, run, initial):
    batch, inside = q.shape[0], spec.inside.problem(q, k)
    call = _call(spec, q, k, v, log_decay, run)
    split = functools.partial(_split, call.queries.chunk)
    y, norm = attend(spec.inside, *map(split, (q, k, v, log_decay, run)), save_norm=inside.normalize)
    states = _states(spec.enter, call.keys, k, call.values, call.weights.reach, call.weights.keep, initial)
    through, own = call.weights.through, {}
    if inside.normalize:
        own = {"normalizer": states.normalizer, "own_norm": _join(batch, norm), "floor": inside.floor}
    elif inside.output_scale != 1:
        shape = (batch, k.shape[2], q.shape[1])
        through = jnp.broadcast_to(inside.output_scale * (1.0 if through is None else through), shape)
    y = query(call.queries, q, states.kv, through, y.reshape(q.shape), power=inside.query_power, **own)
    y, norm = y if inside.normalize else (y, None)
    return y, _public(states) if spec.final_state else None, norm


@in_32_bits
def _attention_backward(spec: ChunkedAttention, saved, cotangents):
    q, k, v, log_decay, run, initial, y, norm = saved
    dy, dfinal = cotangents
    batch, inside = q.shape[0], spec.inside.problem(q, k)
    call = _call(spec, q, k, v, log_decay, run)
    chunk, weights = call.queries.chunk, call.weights
    split = functools.partial(_split, chunk)
    states = _states(spec.enter, call.keys, k, call.values, weights.reach, weights.keep, initial)

    # u, and what reaches the normaliser, with the squared scale that is left out of the features.
    scale = jnp.full((1, 1, 1), inside.query_power**2 * inside.output_scale, jnp.float32)
    if inside.normalize:
        scale = scale * jnp.exp2(-norm)
        delta = jnp.einsum("bthv,bthv->bht", dy, y, preferred_element_type=jnp.float32)
        through = 1.0 if weights.through is None else jnp.repeat(weights.through, call.queries.repeats, axis=1)
        to_normalizer = -delta * scale * through
    else:
        scale = jnp.broadcast_to(scale, (batch, q.shape[2], q.shape[1]))
        to_normalizer = jnp.zeros_like(scale)
    u = _scaled(dy, scale, weights.through)
    dstates = _states(spec.enter, call.queries, q, u, to_normalizer, weights.keep, dfinal, reverse=True)

    inputs = map(split, (q, k, v, log_decay, run, y))
    norms = None if norm is None else jnp.moveaxis(norm.reshape(*norm.shape[:2], -1, chunk), 2, 1)
    norms = None if norm is None else norms.reshape(-1, *norms.shape[2:])
    dq, dk, dv, dlog_decay = differentiate(spec.inside, *inputs, norms, split(dy))
    dq, dk, dv = dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
    has_decay = log_decay is not None
    dv = query(call.keys, k, dstates.kv, weights.reach, dv)
    ones = jnp.ones((batch, k.shape[2], k.shape[1]), jnp.float32)
    reach = ones if weights.reach is None else weights.reach
    own = {"normalizer": states.normalizer, "factor": to_normalizer} if inside.normalize else {}
    dq, *rows = gradient(call.queries, q, u, states.kv, dq, want_sums=has_decay, **own)
    own = {"normalizer": dstates.normalizer, "factor": reach} if inside.normalize or spec.final_state else {}
    dk, *columns = gradient(call.keys, k, call.values, dstates.kv, dk, want_sums=has_decay, **own)
    if has_decay:
        kept = jnp.einsum(
            "bgntrv,bgntrv,tr->bgn", states.kv, dstates.kv, multiplicity(), preferred_element_type=jnp.float32
        )
        if own:
            normalizers = (x.normalizer.astype(jnp.float32).sum(3) for x in (states, dstates))
            kept = kept + jnp.einsum("bgnij,bgnij->bgn", *normalizers)
        row_sums = rows[0].reshape(batch, k.shape[2], -1, q.shape[1]).sum(2)
        dlog_decay = dlog_decay.reshape(log_decay.shape)
        dlog_decay = dlog_decay + decay_gradient(row_sums, columns[0], weights.keep * kept, chunk)
    return dq, dk, dv, dlog_decay, None, None if initial is None else _public(dstates)


_attention.defvjp(_attention_forward, _attention_backward)
