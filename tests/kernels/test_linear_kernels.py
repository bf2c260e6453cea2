"""The stages of the linear score through the interpreter, each against its definition; and that a program lowers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.chunked_cases import assert_near, normal, wide
from support.exhaustive import EXHAUSTIVE

from pallas_kernels.chunked.linear_gradient import gradient
from pallas_kernels.chunked.linear_query import query
from pallas_kernels.chunked.linear_update import update
from pallas_kernels.chunked.problem import Problem, Tiles
from pallas_kernels.chunked.scan import scan
from pallas_kernels.interpreter import interpreted

BATCH, TOKENS, HEADS, GROUPS, CHUNK = 1, 256, 4, 2, 128
CHUNKS, REPEATS = TOKENS // CHUNK, HEADS // GROUPS
PROBLEM = Problem(BATCH, TOKENS, HEADS, GROUPS, CHUNK, Tiles(), True)


def by_chunk(x):
    """[B, T, heads, ...] -> [B, N, C, G, R, ...]."""
    return wide(x).reshape(BATCH, CHUNKS, CHUNK, GROUPS, REPEATS, *x.shape[3:])


def of_tokens(vector):
    """[B, H, T] -> [B, T, H]; of groups, for their heads."""
    return wide(vector).swapaxes(1, 2).repeat(HEADS // vector.shape[1], axis=2)


@pytest.mark.parametrize(("weighted", "dim"), [(True, 64), (False, 128)])
def test_update(weighted, dim):
    """Of factors of both signs; the normaliser is float32."""
    x, w = (normal(seed, BATCH, TOKENS, HEADS, dim) for seed in range(2))
    weight, factor = (normal(2 + i, BATCH, HEADS, TOKENS, dtype=jnp.float32) for i in range(2))
    weight, factor = (weight, factor) if weighted else (None, None)
    with interpreted():
        kv, normalizer = jax.jit(lambda x, w: update(PROBLEM, x, w, weight, factor=factor))(x, w)
    ones = np.ones((BATCH, TOKENS, HEADS))
    weights, factors = (of_tokens(x) if weighted else ones for x in (weight, factor))
    want = np.einsum("bncgr,bncgrk,bncgrv->bgnkv", *map(by_chunk, (weights, x, w)))
    assert_near(kv, want, 2**-8)
    assert_near(normalizer, np.einsum("bncgr,bncgrk->bgnk", by_chunk(factors), by_chunk(x)), 1e-6)


@pytest.mark.parametrize(("normalize", "weighted", "dim"), [(True, True, 64), (False, False, 128)])
def test_query(normalize, weighted, dim):
    """Normalised: some rows are below the floor, and some have weights in the state alone."""
    x, added = normal(0, BATCH, TOKENS, HEADS, dim), normal(1, BATCH, TOKENS, HEADS, dim)
    state = normal(2, BATCH, GROUPS, CHUNKS, dim, dim)
    z = normal(3, BATCH, GROUPS, CHUNKS, dim, dtype=jnp.float32)
    weight = abs(normal(4, BATCH, GROUPS, TOKENS, dtype=jnp.float32)) if weighted else None
    own_norm = normal(5, BATCH, HEADS, TOKENS, dtype=jnp.float32).at[:, :, 5::7].set(jnp.inf)
    extra = {"normalizer": z, "own_norm": own_norm, "floor": 0.5} if normalize else {}
    with interpreted():
        got = jax.jit(lambda *args: query(PROBLEM, *args, power=-0.5, **extra))(x, state, weight, added)
    weights = np.ones((BATCH, TOKENS, HEADS)) if weight is None else of_tokens(weight)
    product = np.einsum("bncgrk,bgnkv->bncgrv", by_chunk(x) / -2, wide(state)).reshape(added.shape)
    want, product = wide(added), product * weights[..., None]
    if normalize:
        got, norm = got
        through = np.einsum("bncgrk,bgnk->bncgr", by_chunk(x) / -2, wide(z)).reshape(BATCH, TOKENS, HEADS)
        inside = np.where(np.isinf(own_norm), 0, 2 ** wide(own_norm)).swapaxes(1, 2)
        total = inside + weights * through.clip(min=0)
        alive = total >= 0.5
        assert 0 < alive.sum() < alive.size
        total = np.where(alive, total, np.inf)
        np.testing.assert_allclose(norm, np.log2(total).swapaxes(1, 2), atol=1e-5)
        want, product = want * (inside / total)[..., None], product / total[..., None]
    assert_near(got, want + product, 2**-7)


@pytest.mark.parametrize(("normalize", "dim"), [(True, 128), (False, 64)])
def test_gradient(normalize, dim):
    """Normalised: with weights, and the sums too."""
    x, w, added = (normal(seed, BATCH, TOKENS, HEADS, dim) for seed in range(3))
    state = normal(3, BATCH, GROUPS, CHUNKS, dim, dim)
    z = normal(4, BATCH, GROUPS, CHUNKS, dim, dtype=jnp.float32)
    weight, factor = (normal(5 + i, BATCH, HEADS, TOKENS, dtype=jnp.float32) for i in range(2))
    extra = {"normalizer": z, "factor": factor, "want_sums": True} if normalize else {}
    weight = weight if normalize else None
    with interpreted():
        got, *sums = jax.jit(lambda *args: gradient(PROBLEM, *args, **extra))(x, w, weight, state, added)
    dx = np.einsum("bncgrv,bgnkv->bncgrk", by_chunk(w), wide(state)).reshape(x.shape)
    if normalize:
        of_factors = np.einsum("bncgr,bgnk->bncgrk", by_chunk(of_tokens(factor)), wide(z))
        dx = dx * of_tokens(weight)[..., None] + of_factors.reshape(x.shape)
        assert_near(sums[0], (wide(x) * dx).sum(-1).swapaxes(1, 2), 2**-7)
    assert_near(got, wide(added) + dx, 2**-7)


@pytest.mark.parametrize(
    ("tile", "chunks", "reverse"),
    [((16, 64), 6, False), ((64,), 8, True), ((16, 64), 6, True), ((64,), 8, False)][: None if EXHAUSTIVE else 2],
)
def test_scan_of_several_chunks_at_a_time(tile, chunks, reverse):
    """Turns of 4 chunks of such tiles, and of 8 of vectors; and what is left over."""
    added = normal(0, 1, 2, chunks, 1, *tile, dtype=jnp.float32)
    weight, initial = abs(normal(1, 1, 2, chunks, dtype=jnp.float32)), normal(2, 1, 2, 1, *tile, dtype=jnp.float32)
    with interpreted():
        before, final = scan(added, weight, initial, reverse=reverse, dtype=jnp.float32)
    state = wide(initial)
    for c in reversed(range(chunks)) if reverse else range(chunks):
        np.testing.assert_allclose(before[:, :, c], state, atol=1e-5)
        state = wide(weight)[:, :, c].reshape(1, 2, *[1] * (state.ndim - 2)) * state + wide(added[:, :, c])
    np.testing.assert_allclose(final, state, atol=1e-5)
