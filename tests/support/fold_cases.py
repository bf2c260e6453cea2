"""Calls of a kernel that folds tokens into states, and how far the results may be from float64's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support import oracle

from twomamba_jax.ops.state import FiniteState

FEATURES = {"linear": 64, "squared": 2080}


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(_normal(seed, *shape, dtype=dtype))


def _normal(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def problem(score, size, rows, *, layers=2, groups=1, dtype=jnp.float32, of_tokens=jnp.float32, previous=False):
    """The arguments of `fold` after the score, but for `due`; rows begin in either half of the ring."""
    heads = layers, len(rows), groups

    def state(seed):
        shape = *heads, FEATURES[score]
        return FiniteState(normal(seed, *shape, 64, dtype=dtype), normal(seed + 1, *shape))

    rings = (normal(seed, *heads, 2 * size, 64, dtype=of_tokens) for seed in (4, 5))
    start = jnp.asarray(np.arange(len(rows), dtype=np.int32) % 2 * size)
    weights = (jnp.asarray(-np.abs(_normal(seed, *shape))) for seed, shape in ((6, (*heads, size)), (7, heads)))
    return state(0), state(2) if previous else None, *rings, start, *weights


def wide(x):
    return np.asarray(x).astype(np.float64)


def expected(score, state, keys, values, start, log_weights, log_carry):
    """What every row would become, in float64, and the sum of its terms' sizes."""
    slots = np.asarray(start)[:, None] + np.arange(log_weights.shape[-1])
    take = functools.partial(np.take_along_axis, indices=slots[None, :, None, :, None], axis=3)
    keys, values = take(wide(keys)), take(wide(values))
    phi = (keys if score == "linear" else oracle.symmetric_features(keys)) * np.exp(wide(log_weights))[..., None]
    carry = np.exp(wide(log_carry))[..., None]

    def after(phi, values, kv, key_sum):
        added = np.einsum("lbgtd,lbgtv->lbgdv", phi, values)
        return FiniteState(carry[..., None] * kv + added, carry * key_sum + phi.sum(3))

    state = jax.tree.map(wide, state)
    return after(phi, values, *state), after(np.abs(phi), np.abs(values), *map(np.abs, state))


def check(score, arguments, due, got):
    """Rows that are due are near the oracle, and the others have kept their bits; `previous` took what was there."""
    state, previous, *tokens = arguments
    new, taken = got
    want, size = expected(score, state, *tokens)
    # Of sums of r + 1 products of a few float32 roundings each; and one rounding to the state's dtype.
    tolerance = np.finfo(np.float32).eps * (tokens[-2].shape[-1] + 8)
    for name in FiniteState._fields:
        new_x, old_x, want_x = getattr(new, name), getattr(state, name), getattr(want, name)
        bound = tolerance * getattr(size, name) + jnp.finfo(new_x.dtype).eps / 2 * np.abs(want_x)
        assert (np.abs(wide(new_x) - want_x) <= bound)[:, due].all()
        np.testing.assert_array_equal(wide(new_x)[:, ~due], wide(old_x)[:, ~due])
        if previous is not None:
            expected_previous = np.where(
                due.reshape(1, -1, *[1] * (old_x.ndim - 2)), wide(old_x), wide(getattr(previous, name))
            )
            np.testing.assert_array_equal(wide(getattr(taken, name)), expected_previous)
    assert (taken is None) == (previous is None)


CASES = [
    ("squared", 4, jnp.float32, jnp.float32, [False, True], False),
    ("squared", 16, jnp.bfloat16, jnp.bfloat16, [True], True),
    ("squared", 1, jnp.float32, jnp.bfloat16, [True, False], True),
    ("linear", 9, jnp.float32, jnp.bfloat16, [True, False, True, False], True),
    ("linear", 16, jnp.bfloat16, jnp.float32, [True, True, True], False),
    ("linear", 1, jnp.float32, jnp.float32, [False, False, False], True),
]
