"""The kernels of decoding as programs that can be lowered and compiled without a GPU."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.decoding.fold import fold
from pallas_kernels.decoding.step import SIZE, DecodeStep, decode_step, padded
from pallas_kernels.quadratic.programs import Program

LAYERS, BATCH, GROUPS = 20, 64, 16  # squared states of more than 2^31 numbers
FEATURES = {"linear": SIZE, "squared": SIZE * (SIZE + 1) // 2}
FOLD_SIZES = (16, 64)


def programs() -> Iterator[Program]:
    """A step and a fold of every score, dtype of the states and of two fold sizes; in bfloat16 keys and values."""
    for score, dtype, size in itertools.product(FEATURES, (jnp.float32, jnp.bfloat16), FOLD_SIZES):
        name = f"{score}-{jnp.dtype(dtype).name}-{size}"
        for normalize, heads in ((True, 1), (True, 4), (False, 1)):
            kinds = f"-heads-{heads}" + normalize * "-normalize"
            yield _step(f"decode_step-{name}{kinds}", score, dtype, size, normalize, heads)
        for rollback in (True, False):
            yield _fold(f"fold-{name}" + rollback * "-rollback", score, dtype, size, rollback)


def _shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _cache(score, dtype, size):
    """kv and key_sum, keys and values of a stack of layers."""
    stack = LAYERS, BATCH, GROUPS
    state = _shape(*stack, FEATURES[score], SIZE, dtype=dtype), _shape(*stack, FEATURES[score])
    return state, [_shape(*stack, 2 * size, SIZE, dtype=jnp.bfloat16)] * 2


def _step(name, score, dtype, size, normalize, heads) -> Program:
    state, ring = _cache(score, dtype, size)
    positions = [_shape(LAYERS, BATCH, dtype=jnp.int32)] * 2
    q = _shape(BATCH, GROUPS, heads, SIZE, dtype=jnp.bfloat16)
    token = [_shape(BATCH, GROUPS, SIZE, dtype=jnp.bfloat16)] * 2
    decays = _shape(BATCH, GROUPS, padded(2 * size))
    spec = DecodeStep(score, normalize, scale=SIZE**-0.5)
    arguments = _shape(dtype=jnp.int32), *state, *ring, *positions, q, *token, decays
    return Program(name, functools.partial(decode_step, spec), arguments)


def _fold(name, score, dtype, size, rollback) -> Program:
    state, ring = _cache(score, dtype, size)
    start, due = _shape(BATCH, dtype=jnp.int32), _shape(BATCH, dtype=bool)
    weights = _shape(LAYERS, BATCH, GROUPS, size), _shape(LAYERS, BATCH, GROUPS)

    def function(kv, key_sum, *rest):
        previous = (rest[0], rest[1]) if rollback else None
        return fold(score, (kv, key_sum), previous, *rest[2 * rollback :])

    return Program(name, function, (*state, *state[: 2 * rollback], *ring, start, *weights, due))
