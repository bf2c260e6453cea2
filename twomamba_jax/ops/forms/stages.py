"""The stages that the forms of the finite scores are made of.

For one chunk of tokens, with S and z the state before it:

    intra    w_ij = score(scale <q_i, k_j>) exp(A_i - A_j),    N_i = sum_j w_ij v_j,    n_i = sum_j w_ij
    query    N_i += exp(A_i) phi(scale q_i)^T S,               n_i += exp(A_i) phi(scale q_i)^T z
    update   S' = exp(A_end) S + sum_j exp(A_end - A_j) phi(k_j) v_j^T,    z' likewise without the values

and y_i = N_i / n_i, or N_i. Arrays are heads-first: q [B, G, R, C, K], k [B, G, C, K], v [B, G, C, V],
log_decay [B, G, C] (None: no decay), segment [B, C] (None: one segment).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twomamba_jax.ops.decay import pairwise_decay, pairwise_log_decay, prefix_log_decay, suffix_log_decay
from twomamba_jax.ops.numerics import accumulation_dtype, contract, divide, operand_dtype
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.score import features
from twomamba_jax.ops.segments import same_segment
from twomamba_jax.ops.state import FiniteState


class Sums(NamedTuple):
    """Numerators [B, G, R, C, V] and denominators [B, G, R, C] (None without normalisation)."""

    numerator: jax.Array
    denominator: jax.Array | None

    def __add__(self, other: "Sums") -> "Sums":
        """Adds two parts of the same rows."""
        denominator = None if self.denominator is None else self.denominator + other.denominator
        return Sums(self.numerator + other.numerator, denominator)

    def scaled(self, weight: jax.Array) -> "Sums":
        """Both sums times a weight per row."""
        return Sums(self.numerator * weight[..., None], None if self.denominator is None else self.denominator * weight)

    def outputs(self, op: Operation) -> jax.Array:
        """y = numerator / denominator, or the numerator."""
        if self.denominator is None:
            return self.numerator
        return divide(self.numerator, self.denominator, op.denominator_floor)


def causal_mask(segment, size: int):
    """[1 or B, 1, 1, C, C]: True where token i may attend to token j."""
    mask = jnp.tril(jnp.ones((1, size, size), bool))
    return (mask if segment is None else mask & same_segment(segment, segment))[:, None, None]


def intra(op: Operation, q, k, v, log_decay, segment) -> Sums:
    """The part of each row that comes from the chunk's own tokens: the quadratic form.

    Where q has fewer tokens than k, they are the chunk's last.
    """
    x = contract("bgrik,bgjk->bgrij", q, k, op.precision) * op.query_scale
    weights = op.finite.weight(x)
    rows = slice(k.shape[2] - q.shape[3], None)
    if log_decay is not None:
        one = q.shape[3] == 1
        decay = jnp.exp(suffix_log_decay(log_decay))[..., None, :] if one else pairwise_decay(log_decay)[..., rows, :]
        weights = weights * decay[:, :, None]
    if log_decay is None or segment is not None:  # a decay is causal by itself
        weights = jnp.where(causal_mask(segment, k.shape[2])[..., rows, :], weights, 0)
    return weighted_sums(op, weights, v)


def exponential_logits(op: Operation, q, k, log_decay, segment) -> jax.Array:
    """scale <q_i, k_j> + A_i - A_j [B, G, R, C, C] of the chunk's own tokens, -inf where j is out of i's sight."""
    logits = contract("bgrik,bgjk->bgrij", q, k, op.precision) * op.query_scale
    if log_decay is not None:
        logits = logits + pairwise_log_decay(log_decay)[:, :, None]
    return jnp.where(causal_mask(segment, k.shape[2]), logits, -jnp.inf)


def weighted_sums(op: Operation, weights, v) -> Sums:
    """sum_j w_ij v_j, and sum_j w_ij in the accumulation dtype if the operation normalises."""
    operand = operand_dtype(v.dtype, op.precision)
    numerator = contract("bgrij,bgjv->bgriv", weights.astype(operand), v.astype(operand), op.precision)
    return Sums(numerator, weights.sum(-1) if op.normalize else None)


def query(op: Operation, q, log_decay, continues, state: FiniteState) -> Sums:
    """The part of each row that comes through the state. `continues [B, C]`: the token is in the state's segment."""
    phi = features(op.score, q.astype(accumulation_dtype(q.dtype)) * op.query_scale)
    operand = operand_dtype(q.dtype, op.precision)
    numerator = contract("bgrcd,bgdv->bgrcv", phi.astype(operand), state.kv.astype(operand), op.precision)
    weight = _weight(prefix_log_decay, log_decay, continues, phi.dtype)[:, :, None]
    denominator = None
    if op.normalize:
        denominator = not_negative(contract("bgrcd,bgd->bgrc", phi, state.key_sum, "highest"))
    return Sums(numerator, denominator).scaled(weight)


def not_negative(denominator):
    """What comes through a state: in exact arithmetic a sum of scores >= 0, of which rounding may leave less than 0."""
    return jnp.where(denominator < 0, 0, denominator)


def update(op: Operation, k, v, log_decay, reaches) -> FiniteState:
    """What the chunk adds to the state at its end. `reaches [B, C]`: the token is in the segment of the last one."""
    phi = features(op.score, k)
    weight = _weight(suffix_log_decay, log_decay, reaches, phi.dtype)
    operand = operand_dtype(k.dtype, op.precision)
    weighted = (v * weight[..., None]).astype(operand)
    kv = contract("bgck,bgcv->bgkv", phi.astype(operand), weighted, op.precision)
    return FiniteState(kv, contract("bgck,bgc->bgk", phi, jnp.broadcast_to(weight, phi.shape[:-1]), "highest"))


def carry_weight(log_decay, continues, dtype):
    """The factor [B, G] on the old state: exp(A_end), 0 where the last token `continues [B]` no longer."""
    total = jnp.zeros((1, 1), dtype) if log_decay is None else log_decay.sum(-1)
    return jnp.exp(total) if continues is None else jnp.where(continues[:, None], jnp.exp(total), 0)


def _weight(decay_sum, log_decay, keep, dtype):
    """exp of a decay sum [B, G, C], 0 where `keep [B, C]` is False (None: everywhere True)."""
    weight = jnp.ones((1, 1, 1), dtype) if log_decay is None else jnp.exp(decay_sum(log_decay))
    return weight if keep is None else jnp.where(keep[:, None], weight, 0)
