"""Calls of a kernel that attends with one token per row to a cache, and how far the results may be from float64's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decoding.contract import DecodeStep, padded
from twomamba_jax.ops.decoding.recurrent_cache import RecurrentCache, waiting_decays
from twomamba_jax.ops.score import num_features
from twomamba_jax.ops.state import FiniteState


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def phi(score, x):
    """The features of x [..., 64] in float64, by the definition in `ops.score`."""
    if score == "linear":
        return x
    blocks = [np.sqrt(2) * x * np.roll(x, -offset, axis=-1) for offset in range(1, 33)]
    return np.concatenate([x * x, *blocks[:-1], blocks[-1][..., :32]], axis=-1)


def sums(score, q, kv, key_sum, keys, values, decays):
    """Numerators [R, 64], denominators through the state and of the tokens [R], of one head in float64."""
    state_weight, *weights = (np.exp(decays[t:].sum()) for t in range(len(decays) + 1))
    features = state_weight * phi(score, q)
    scores = (q @ keys.T) ** (2 if score == "squared" else 1) * weights
    return features @ kv + scores @ values, features @ key_sum, scores.sum(-1)


def problem(score, repeats, dtype, state_dtype, fold, waiting):
    """The arguments of the kernel for rows in which `waiting` tokens wait, and what is to come out, [B, 1, R, 3, 64].

    Then the same sums of magnitudes. What is in the other layer, and in slots without a token that waits, is NaN.
    """
    rows, features, capacity = len(waiting), num_features(score, 64), 2 * fold
    kv, key_sum = normal(0, rows, 1, features, 64, dtype=state_dtype), normal(1, rows, 1, features)
    q = normal(2, rows, 1, repeats, 64, dtype=dtype)
    keys, values = normal(3, 2, rows, 1, max(waiting) + 1, 64, dtype=dtype)  # in order, the new token's the last
    decays = -jnp.abs(normal(4, rows, 1, max(waiting) + 1)) / 4

    folded = np.arange(rows) * 7 * fold
    rings = np.full((2, rows, 1, capacity, 64), np.nan, np.float32)
    ring_decays = np.full((rows, 1, capacity), np.nan, np.float32)
    want, size = [], []
    for b, count in enumerate(waiting):
        slots = (folded[b] + np.arange(count)) % capacity
        rings[:, b, 0, slots] = keys[b, 0, :count], values[b, 0, :count]
        ring_decays[b, 0, slots] = decays[b, 0, :count]
        arrays = q[b, 0], kv[b, 0], key_sum[b, 0], keys[b, 0, : count + 1], values[b, 0, : count + 1]
        arrays = [np.asarray(x, np.float64) for x in (*arrays, decays[b, 0, : count + 1])]
        arrays[0] /= 8
        want.append(sums(score, *arrays))
        size.append(sums(score, *map(np.abs, arrays[:-1]), arrays[-1]))

    def together(rows):
        numerators, *denominators = map(np.stack, zip(*rows, strict=True))
        return np.stack([numerators, *(np.repeat(x[..., None], 64, -1) for x in denominators)], axis=2)[:, None]

    last, at = jnp.asarray(waiting), jnp.arange(rows)
    ends = jnp.asarray(folded, jnp.int32), jnp.asarray(folded + waiting, jnp.int32)
    cache = RecurrentCache(FiniteState(kv, key_sum), None, *jnp.asarray(rings, dtype), jnp.asarray(ring_decays), *ends)
    stack = jax.tree.map(lambda x: jnp.stack([jnp.full_like(x, jnp.nan if x.ndim > 1 else 0), x]), cache)
    log_decay = waiting_decays(decays[at, :, last][..., None], cache, padded(capacity))
    of_token = q, keys[at, :, last], values[at, :, last], log_decay
    arguments = jnp.int32(1), *stack.state, stack.keys, stack.values, stack.folded, stack.length, *of_token
    return arguments, together(want), together(size)


CASES = [
    ("squared", True, 1, jnp.float32, jnp.float32, 4, (0, 3)),  # nothing waits; as many as can, across the ring's end
    ("squared", True, 2, jnp.bfloat16, jnp.bfloat16, 40, (39, 1)),  # two tiles
    ("squared", False, 1, jnp.bfloat16, jnp.float32, 16, (15,)),
    ("linear", True, 3, jnp.float16, jnp.float32, 1, (0, 0)),
    ("linear", False, 4, jnp.float32, jnp.bfloat16, 32, (31, 30)),  # a whole tile
    ("linear", True, 4, jnp.bfloat16, jnp.float32, 40, (17, 39)),
]


def check(decode_step, score, normalize, *case):
    """The parts that a kernel gives add up to what is expected."""
    arguments, want, size = problem(score, *case)
    parts = jax.jit(functools.partial(decode_step, DecodeStep(score, normalize, 1 / 8)))(*arguments)
    got = np.asarray(parts, np.float64).sum(0)
    want, size = (x if normalize else x[:, :, :, :1] for x in (want, size))
    assert got.shape == want.shape
    # Sums of products of float32 numbers: no more than an epsilon for each of the terms, far fewer in fact.
    terms = np.sqrt(arguments[1].shape[3] + arguments[3].shape[3])
    assert (np.abs(got - want) <= terms * np.finfo(np.float32).eps * size).all()
