"""The recurrent form of the finite scores (Algorithm 6): a state per token.

A token attends to itself directly and to the state of the tokens before it; only then is it folded into the state.
Folding it in first would cost a digit or two: its own weight would come from a product of features.
"""

import jax
import jax.numpy as jnp

from twomamba_jax.ops.forms import key_values, stages
from twomamba_jax.ops.forms.chunked import scan
from twomamba_jax.ops.forms.parallel import final_state, parallel, softmax
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import FiniteState, State


def step(op: Operation, q, k, v, log_decay, state: State):
    """One token, T = 1; heads-first arrays as in `stages`. Returns y [B, G, R, 1, V] and the next state."""
    if op.finite:
        return parallel(op, q, k, v, log_decay, None, state), final_state(op, k, v, log_decay, None, state)
    state = key_values.write(k, v, log_decay, state.start, jnp.ones_like(state.length), state)
    # The new token is in the cache by now, with weight 1: nothing more decays.
    return softmax(op, (key_values.logits(op, q, None, None, state), state.values)), state


def recurrent(op: Operation, q, k, v, log_decay, segment, state: FiniteState | None, axis: SequenceAxis | None = None):
    """The whole sequence as an associative scan over tokens. It holds T states at once: for small T and K.

    `axis`: tokens and states as in `chunked.scan`.

    Returns:
      y [B, G, R, T, V] in the accumulation dtype, and the final state.
    """

    def by_token(x, axis):
        """[..., T, ...] -> [T, ..., 1, ...]."""
        return None if x is None else jnp.expand_dims(jnp.moveaxis(x, axis, 0), axis + 1)

    q, k, v, log_decay = by_token(q, 3), by_token(k, 2), by_token(v, 2), by_token(log_decay, 2)
    # Whether a token continues the segment of the one before it; token 0 continues the initial state's.
    continues = None if segment is None else (segment == jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]).T

    def update(k, v, log_decay, continues):
        added = stages.update(op, k, v, log_decay, None)
        weight = stages.carry_weight(log_decay, continues, added.kv.dtype)
        return jnp.broadcast_to(weight, added.kv.shape[:2]), added

    def output(q, k, v, log_decay, continues, before):
        keep = None if continues is None else continues[:, None]
        sums = stages.intra(op, q, k, v, log_decay, None) + stages.query(op, q, log_decay, keep, before)
        return sums.outputs(op)

    before, final = scan(*jax.vmap(update)(k, v, log_decay, continues), state, axis)
    y = jax.vmap(output)(q, k, v, log_decay, continues, before)
    return jnp.moveaxis(y[:, :, :, :, 0], 0, 3), final
