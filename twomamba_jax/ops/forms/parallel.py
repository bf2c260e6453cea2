"""The parallel form: the definition of the operation, quadratic in T, for every score."""

import functools
import operator

import jax
import jax.numpy as jnp

from twomamba_jax.ops import recurrence
from twomamba_jax.ops.decay import prefix_log_decay
from twomamba_jax.ops.forms import key_values, stages
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.state import FiniteState, State


def parallel(op: Operation, q, k, v, log_decay, segment, state: State | None):
    """All T^2 weights at once; heads-first arrays as in `stages`.

    Returns:
      y [B, G, R, T, V] in the accumulation dtype.
    """
    seen = None if segment is None else segment == 0  # the tokens that see the initial state
    if op.finite:
        sums = stages.intra(op, q, k, v, log_decay, segment)
        if state is not None:
            sums = sums + stages.query(op, q, log_decay, seen, state)
        return sums.outputs(op)
    parts = [(stages.exponential_logits(op, q, k, log_decay, segment), v)]
    if state is not None:
        passed = None if log_decay is None else prefix_log_decay(log_decay)
        parts.append((key_values.logits(op, q, passed, seen, state), state.values))
    return softmax(op, *parts)


def softmax(op: Operation, *parts: tuple[jax.Array, jax.Array]):
    """sum_j e^logit_ij v_j over the keys of all parts (logits, v), divided by sum_j e^logit_ij if `op` normalises."""
    # The largest logit cancels in the quotient: its derivative is not taken.
    largest = 0.0
    if op.normalize:
        rows = [jax.lax.stop_gradient(logits.max(-1, keepdims=True)) for logits, _ in parts]
        largest = functools.reduce(jnp.maximum, rows)
    sums = [stages.weighted_sums(op, jnp.exp(logits - largest), v) for logits, v in parts]
    return functools.reduce(operator.add, sums).outputs(op)


def final_state(op: Operation, k, v, log_decay, segment, state: FiniteState | None) -> FiniteState:
    """The finite state after the last token, in one step."""
    added = stages.update(op, k, v, log_decay, None if segment is None else segment == segment[:, -1:])
    if state is None:
        return added
    survives = None if segment is None else segment[:, -1] == 0
    return recurrence.advance(state, stages.carry_weight(log_decay, survives, added.kv.dtype), added)
