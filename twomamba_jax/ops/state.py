"""The state that one call hands to the next: plain pytrees.

A finite state is scale-free: a function of the keys, the values and the decay alone. The exponential score has no
finite state, only a key/value cache of fixed capacity.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.ops.score import Score, num_features, score_spec
from twomamba_jax.shapes import Array, Float, Int


class FiniteState(NamedTuple):
    """What `linear` and `squared` remember of a segment, in float32 or wider.

    kv = sum_j exp(A_end - A_j) phi(k_j) v_j^T, and key_sum the same without the values (the normaliser).

    Examples:
      >>> k, v = 2 * jnp.ones((1, 1, 1, 1)), 5 * jnp.ones((1, 1, 1, 1))
      >>> _, state = decay_attention(k, k, v, return_final_state=True)
      >>> state.kv.item(), state.key_sum.item()  # k^2 v and k^2
      (20.0, 4.0)
    """

    kv: Float[Array, "B G D V"]
    key_sum: Float[Array, "B G D"]


class KeyValueCache(NamedTuple):
    """What `exp` remembers: the key, the value and the log decay of every token, token t in slot t.

    Tokens `start`, ..., `length` - 1 are in the segment that goes on; the next one goes to slot `length`. Decays are as
    they came, and summed from the end when they are needed: a token writes its own slot alone, and taking back tokens
    is taking back the length. `log_decay` is None where no token has a decay.

    Examples:
      >>> state = init_state("exp", batch=1, num_kv_heads=2, head_dim=4, value_dim=4, capacity=32)
      >>> state.keys.shape, state.log_decay.shape, state.length.tolist()
      ((1, 2, 32, 4), (1, 2, 32), [0])
    """

    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S V"]
    log_decay: Float[Array, "B G S"] | None
    start: Int[Array, "B"]
    length: Int[Array, "B"]


State = FiniteState | KeyValueCache


def init_state(
    score: Score,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    capacity: int | None = None,
    decay: bool = True,
    dtype=jnp.float32,
) -> State:
    """The empty state of a score.

    Args:
      score: `linear` or `squared` give a `FiniteState`, `exp` a `KeyValueCache`.
      batch: B.
      num_kv_heads: G.
      head_dim: K.
      value_dim: V.
      capacity: S, the tokens that a key/value cache can hold; needed by `exp`, refused by the others.
      decay: whether a key/value cache keeps log decays; one without takes tokens without a decay only. A finite state
        does not ask.
      dtype: of the cached keys and values; a finite state and the log decays are float32, or wider if `dtype` is.

    Raises:
      ValueError: an unknown score; `capacity` missing, below 1, or given for a finite score.

    Examples:
      >>> state = init_state("squared", batch=1, num_kv_heads=2, head_dim=4, value_dim=3)
      >>> state.kv.shape, state.key_sum.shape
      ((1, 2, 10, 3), (1, 2, 10))
    """
    wide = accumulation_dtype(dtype)
    if score_spec(score).finite:
        if capacity is not None:
            raise ValueError(f"capacity={capacity} given for score={score!r}, whose state has a constant size: omit it")
        shape = (batch, num_kv_heads, num_features(score, head_dim))
        return FiniteState(jnp.zeros((*shape, value_dim), wide), jnp.zeros(shape, wide))
    if capacity is None or capacity < 1:
        raise ValueError(f"score={score!r} keeps a key/value cache: capacity must be at least 1, got {capacity}")
    slots = batch, num_kv_heads, capacity
    start, length = jnp.zeros((2, batch), jnp.int32)
    return KeyValueCache(
        keys=jnp.zeros((*slots, head_dim), dtype),
        values=jnp.zeros((*slots, value_dim), dtype),
        log_decay=jnp.zeros(slots, wide) if decay else None,
        start=start,
        length=length,
    )


def state_bytes(state) -> int:
    """The size in bytes of a state, or of any pytree of arrays or `ShapeDtypeStruct`s.

    Examples:
      >>> state = init_state("linear", batch=1, num_kv_heads=2, head_dim=4, value_dim=3)
      >>> state_bytes(state)  # two heads' 4 x 3 and 4 numbers in float32
      128
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
