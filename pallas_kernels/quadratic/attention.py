"""Quadratic attention as kernels, with gradients: what the kernels support, and what they are given."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.device import in_32_bits
from pallas_kernels.interpreter import interpreting
from pallas_kernels.quadratic.context import Context
from pallas_kernels.quadratic.decay_gradient import decay_gradient
from pallas_kernels.quadratic.operands import LOG2E, Problem
from pallas_kernels.residuals import named, named_small

HEAD_DIMS = (64, 128)
SCORES = ("linear", "squared", "exp")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The three kernels in one language.

    A tuning has `forward`, `queries` and `keys`, the tiles of each kernel; `own` is how many tokens a program of it
    owns.

    Attributes:
      forward: (problem, tuning, q, k, v, decay, first_visible, save_norm) -> y [B, T, H, V] and, if `save_norm`, log2
        of the row sums [B, H, T padded] (+inf where the row is 0).
      backward_queries: (problem, tuning, q, k, v, dy, norm, delta, decay, first_visible) -> dq and, with a decay,
        sum_j W_ij [B, H, T padded], with W as in `operands.slope_of`.
      backward_keys: (problem, tuning, q, k, v, dy, logit, delta, decay, last_visible) -> dk, dv and, with a decay,
        sum_i W_ij [B, G, T padded].
      tuning: (score, head dim, tokens) -> the tuning on this device.
      float16: whether they also take float16, where no weight leaves its range: those of exp, normalised.
    """

    forward: Callable
    backward_queries: Callable
    backward_keys: Callable
    tuning: Callable
    float16: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """What to compute, apart from the arrays and their sizes.

    Attributes:
      kernels: that compute it.
      score: `linear`, `squared` or `exp`.
      normalize: divide each row by the sum of its weights.
      scale: factor on <q, k>.
      floor: rows whose weights sum to less are 0.
      tuning: tile sizes; None takes the kernels' own.
    """

    kernels: Kernels
    score: str
    normalize: bool
    scale: float
    floor: float
    tuning: object | None = None

    def problem(self, q, k) -> Problem:
        """The kernels' view of a call."""
        exponential = self.score == "exp"
        # A power of two multiplies bfloat16 exactly; what is left of the scale is for the sums, in float32.
        power = 1.0
        if not exponential and self.scale:
            power = math.copysign(2.0 ** math.floor(math.log2(abs(self.scale))), self.scale)
        rest = self.scale / power
        rest = rest * rest if self.score == "squared" else rest
        return Problem(
            batch=q.shape[0],
            tokens=q.shape[1],
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            score=self.score,
            normalize=self.normalize,
            query_power=power,
            logit_scale=rest * LOG2E if exponential else 1.0,
            output_scale=1.0 if exponential or self.normalize else rest,
            floor=0.0 if exponential else self.floor / rest if rest else math.inf,
            interpret=interpreting(),
        )

    def tiles(self, q):
        """The tuning of a call."""
        return self.tuning or self.kernels.tuning(self.score, q.shape[3], q.shape[1])


def unsupported(kernels: Kernels, q, k, v, *, score: str, normalize: bool, precision: str | None) -> str | None:
    """Why the kernels cannot compute a call, on a device that they are written for, or None if they can."""
    if score not in SCORES:
        return f"score={score!r} is none of {', '.join(SCORES)}"
    if q.dtype != jnp.bfloat16 and not (kernels.float16 and q.dtype == jnp.float16):
        return f"it takes bfloat16 q, k and v, got {q.dtype}"
    if q.dtype == jnp.float16 and not (score == "exp" and normalize):
        return f"it takes float16 for score='exp', normalised, whose weights are at most 1, got {score=}, {normalize=}"
    if precision is not None:
        return f"precision={precision!r} needs products of float32, and it has those of bfloat16"
    if k.shape[-1] not in HEAD_DIMS:
        return f"it has heads of 64 or 128, the larger of K and V, and this is {k.shape[-1]}"
    return None


def attention(attention: Attention, q, k, v, log_decay, segment):
    """y [B, T, H, V] in q's dtype; differentiable in q, k, v and log_decay.

    Args:
      attention: what to compute.
      q: [B, T, H, K], bfloat16 or what else `unsupported` lets pass; k, v: [B, T, G, K] of the same dtype, with H a
        multiple of G and K 64 or 128.
      log_decay: [B, T, G] float32, not positive and not below -128; None: no decay.
      segment: [B, T] int32, the number of each token's segment in its row, ascending; None: one segment.
    """
    if attention.score == "exp" and attention.scale < 0:  # the kernels count from the largest score of a row
        attention, q = dataclasses.replace(attention, scale=-attention.scale), -q
    tokens = q.shape[1]
    if padding := -tokens % 8:  # what the copies of tiles need of memory

        def pad(x, mode="constant"):
            return None if x is None else jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)

        q, k, v, log_decay, segment = pad(q), pad(k), pad(v), pad(log_decay), pad(segment, "edge")
    return _attention(attention, q, k, v, log_decay, segment)[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(attention: Attention, q, k, v, log_decay, segment):
    context = Context.make(log_decay, segment, attention.tiles(q))
    return attend(attention, q, k, v, context, save_norm=False)[0]


def _attention_forward(attention: Attention, q, k, v, log_decay, segment):
    context = named_small(Context.make(log_decay, segment, attention.tiles(q)))
    y, norm = named(*attend(attention, q, k, v, context, save_norm=attention.normalize))
    return y, (q, k, v, context, y, norm)


def _attention_backward(attention: Attention, saved, dy):
    return *differentiate(attention, *saved, dy), None


@in_32_bits
def differentiate(attention: Attention, q, k, v, context: Context, y, norm, dy):
    """The gradients of q, k, v and log_decay, of rows whose weights sum to 2^norm [B, H, T] (None: not normalised)."""
    problem, tuning = attention.problem(q, k), attention.tiles(q)
    (batch, tokens, heads, _), kv_heads = q.shape, k.shape[2]
    delta = None
    if attention.normalize:
        delta = jnp.einsum("bthv,bthv->bht", dy, y, preferred_element_type=jnp.float32)

    own = tuning.queries.own
    dq, *row_sums = attention.kernels.backward_queries(
        problem,
        tuning,
        *(q, k, v, dy),
        _pad(norm, own),
        _pad(delta, own),
        context.decay(own),
        _pad(context.first_visible, own, "edge"),
    )

    own = tuning.keys.own
    decay = context.decay(own)
    logit = None if norm is None else -_pad(norm, own)
    if decay is not None:
        prefix = jnp.repeat(decay.prefix, heads // kv_heads, axis=1)
        logit = prefix if logit is None else prefix + logit
    dk, dv, *column_sums = attention.kernels.backward_keys(
        problem,
        tuning,
        *(q, k, v, dy),
        logit,
        _pad(delta, own),
        decay,
        _pad(context.last_visible, own, "edge"),
    )

    dlog_decay = None
    if decay is not None:
        row_sums = row_sums[0][..., :tokens].reshape(batch, kv_heads, -1, tokens).sum(2)
        dlog_decay = decay_gradient(row_sums, column_sums[0][..., :tokens], context.segment)
    return dq, dk, dv, dlog_decay


_attention.defvjp(_attention_forward, _attention_backward)


@in_32_bits
def attend(attention: Attention, q, k, v, context: Context, save_norm: bool):
    """y, and log2 of the sums of its rows' weights [B, H, T] float32 (+inf where y is 0) if `save_norm`, or None."""
    tuning = attention.tiles(q)
    own = tuning.forward.own
    y, *norm = attention.kernels.forward(
        attention.problem(q, k),
        tuning,
        *(q, k, v),
        context.decay(own),
        _pad(context.first_visible, own, "edge"),
        save_norm=save_norm,
    )
    return y, norm[0][..., : q.shape[1]] if norm else None


def _pad(x, block: int, mode="constant"):
    """Pads the last axis to a multiple of `block`."""
    return None if x is None else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)], mode=mode)
