"""The fold of decoding in Triton: interpreted without a GPU, compiled with one, against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE
from support.fold_cases import CASES, check, problem
from support.triton import COMPILED  # before triton

from pallas_kernels.triton.decoding import fold as kernel


@pytest.fixture
def few_programs(monkeypatch):
    """Two in all, each with tiles of several states and several tiles of one: large ones, for the interpreter."""
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    if COMPILED:
        return
    large = kernel.FoldTiles(height=512, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernel, "TILES", dict.fromkeys(kernel.TILES, large))


MORE = [
    ("squared", 40, jnp.bfloat16, jnp.float32, [True, False], True),  # two blocks of tokens, the second not full
    ("linear", 130, jnp.float32, jnp.bfloat16, [False, True], False),
]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("score", "size", "dtype", "of_tokens", "due", "previous"),
    CASES + MORE if EXHAUSTIVE else [CASES[0], CASES[3], MORE[0]],
    ids=str,
)
def test_equals_the_formula(score, size, dtype, of_tokens, due, previous):
    due = np.array(due)
    layers, groups = (1, 1) if score == "squared" else (2, 2)
    options = {"layers": layers, "groups": groups, "dtype": dtype, "of_tokens": of_tokens, "previous": previous}
    arguments = problem(score, size, due, **options)
    check(score, arguments, due, jax.jit(functools.partial(kernel.fold, score))(*arguments, due))


@pytest.mark.usefixtures("few_programs")
def test_mapped_states_are_those_that_each_would_be_alone():
    due = np.array([True, False])
    one = problem("linear", 4, due, previous=True)
    one = jax.tree.map(np.asarray, one)
    pair = one, jax.tree.map(lambda x: np.ascontiguousarray(x[..., ::-1]), one)
    fold = jax.jit(functools.partial(kernel.fold, "linear"))
    got = jax.jit(jax.vmap(fold, in_axes=(*[0] * len(one), None)))(*jax.tree.map(lambda *x: np.stack(x), *pair), due)
    want = jax.tree.map(lambda *x: np.stack(x), *(fold(*arguments, due) for arguments in pair))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_more_programs_than_tiles_that_are_due():
    """In the tiles of the table."""
    due = np.array([False, True])
    arguments = problem("squared", 3, due, layers=1)
    check("squared", arguments, due, jax.jit(functools.partial(kernel.fold, "squared"))(*arguments, due))


@pytest.mark.usefixtures("few_programs")
def test_rows_that_are_not_due_may_hold_anything():
    """NaN in a row's state, tokens and decays stays there, and nothing of it reaches another row."""
    due = np.array([True, False, True])
    arguments = problem("linear", 4, due, previous=True)
    state, previous, keys, values, start, *weights = arguments

    def poisoned(x):
        x = np.array(x)
        x[:, 1] = np.nan
        return jnp.asarray(x)

    poison = jax.tree.map(poisoned, (state, previous, keys, values)), start, jax.tree.map(poisoned, weights)
    poison = (*poison[0], start, *poison[2])
    fold = jax.jit(functools.partial(kernel.fold, "linear"))
    clean, dirty = (jax.tree.map(np.asarray, fold(*x, due)) for x in (arguments, poison))
    for want, got, before in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), jax.tree.leaves(poison)):
        np.testing.assert_array_equal(got[:, due], want[:, due])
        np.testing.assert_array_equal(got[:, 1], before[:, 1])


@pytest.mark.usefixtures("few_programs")
def test_slots_without_a_token_to_fold_may_hold_anything():
    """NaN in the half of the ring that is not folded reaches no state."""
    due = np.array([True, True])
    state, previous, keys, values, start, *weights = problem("squared", 3, due, layers=1)
    folded = (np.arange(6) // 3 == np.asarray(start)[:, None] // 3)[None, :, None, :, None]
    fold = jax.jit(functools.partial(kernel.fold, "squared"))
    poison = tuple(np.where(folded, x, np.float32(np.nan)) for x in (keys, values))
    clean, dirty = (fold(state, previous, *rings, start, *weights, due) for rings in ((keys, values), poison))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
