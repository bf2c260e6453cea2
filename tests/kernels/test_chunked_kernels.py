"""The chunked kernels through the interpreter: each against its definition, and all together against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.chunked_cases import Case, assert_near, normal, wide
from support.chunked_scans import STARTS, check_parts, check_products, check_states
from support.chunked_stages import BATCH, CHUNK, CHUNKS, GROUPS, HEADS, PAIRS, TOKENS, by_chunk, full_state, two_parts
from support.exhaustive import EXHAUSTIVE

from pallas_kernels.chunked import layout
from pallas_kernels.chunked.gradient import gradient
from pallas_kernels.chunked.normalizer import normalizer
from pallas_kernels.chunked.problem import Problem, Tiles
from pallas_kernels.chunked.query import query
from pallas_kernels.chunked.scan import scan
from pallas_kernels.chunked.update import update
from pallas_kernels.interpreter import interpreted
from twomamba_jax.ops.score import symmetric_features

PROBLEM = Problem(BATCH, TOKENS, HEADS, GROUPS, CHUNK, Tiles(tokens=64, states=8, halves=1, programs=3), True)


def test_layout_is_a_bijection_with_the_public_state():
    x, y = (wide(normal(seed, 64)) for seed in (0, 1))
    phi = [np.asarray(symmetric_features(jnp.asarray(a, jnp.float32))) for a in (x, y)]
    public = jnp.asarray(phi[0][None, None, :, None])
    tiles = layout.pack(public)
    np.testing.assert_allclose(tiles[0, 0, ..., 0], x[PAIRS[..., 0]] * x[PAIRS[..., 1]], rtol=1e-6)
    np.testing.assert_allclose(layout.unpack(tiles), public, rtol=1e-6)
    squared = (layout.multiplicity() * y[PAIRS].prod(-1) * np.asarray(tiles[0, 0, ..., 0])).sum()
    np.testing.assert_allclose(squared, (x @ y) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(layout.block_multiplicity().repeat(16, axis=1), layout.multiplicity())
    matrix = layout.pack_normalizer(public[..., 0])
    np.testing.assert_allclose(matrix[0, 0], np.outer(x, x), rtol=1e-6)
    np.testing.assert_allclose(layout.unpack_normalizer(matrix), public[..., 0], rtol=1e-6)


def test_tiles_say_what_they_may_be():
    with pytest.raises(ValueError, match="tokens=96 must be a multiple of 64"):
        Tiles(tokens=96)


def test_update():
    x, w = normal(0, BATCH, TOKENS, HEADS, 64), normal(1, BATCH, TOKENS, HEADS, 64)
    with interpreted():
        got = jax.jit(lambda x, w: update(PROBLEM, x, w))(x, w)
    features = by_chunk(x)[..., PAIRS].prod(-1)
    want = np.einsum("bnchtr,bnchv->bntrv", features, by_chunk(w))[:, None]
    assert_near(got, want, 2**-8)


@pytest.mark.parametrize("weighted", [True, False] if EXHAUSTIVE else [True])
def test_normalizer(weighted):
    """Of factors of both signs, to float32 or nearly so."""
    x = normal(0, BATCH, TOKENS, HEADS, 64)
    factor = normal(1, BATCH, HEADS, TOKENS, dtype=jnp.float32) if weighted else None
    with interpreted():
        got = jax.jit(lambda x: normalizer(PROBLEM, x, factor))(x)
    factors = by_chunk(factor.swapaxes(1, 2))[..., 0] if weighted else np.ones((BATCH, CHUNKS, CHUNK, HEADS))
    want = np.einsum("bnch,bncha,bnche->bnae", factors, by_chunk(x), by_chunk(x))[:, None]
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize(("reverse", "starts"), STARTS[: 3 if EXHAUSTIVE else 2])
def test_scan(reverse, starts):
    with interpreted():
        check_states(scan, reverse, starts)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_a_sum_of_two(reverse):
    with interpreted():
        check_parts(scan, reverse)


@pytest.mark.parametrize("counted", [False, True])
def test_scan_with_inner_products(counted):
    with interpreted():
        check_products(scan, counted)


# Without normalisation they do a part of what they do with it.
STAGES_ALONE = [True, False] if EXHAUSTIVE else [True]


@pytest.mark.parametrize("normalize", STAGES_ALONE)
def test_query(normalize):
    x, added = normal(0, BATCH, TOKENS, HEADS, 64), normal(1, BATCH, TOKENS, HEADS, 64)
    tiles, full = full_state(2)
    parts, z = two_parts(3)
    weight = abs(normal(4, BATCH, GROUPS, TOKENS, dtype=jnp.float32))
    own_norm = normal(5, BATCH, HEADS, TOKENS, dtype=jnp.float32) + 8
    extra = {"normalizer": parts, "own_norm": own_norm} if normalize else {}
    with interpreted():
        got = jax.jit(lambda *args: query(PROBLEM, *args, power=0.5, **extra))(x, tiles, weight, added)
    xs = by_chunk(x) / 2
    y = np.einsum("bncha,bnche,bnaev->bnchv", xs, xs, full[:, 0]).reshape(added.shape)
    y, want = y * wide(weight)[:, 0, :, None, None], wide(added)
    if normalize:
        through = np.einsum("bncha,bnche,bnae->bnch", xs, xs, z[:, 0]).reshape(BATCH, TOKENS, HEADS)
        inside = 2 ** wide(own_norm).swapaxes(1, 2)
        total = inside + through * wide(weight)[:, 0, :, None]
        got, norm = got
        np.testing.assert_allclose(norm, np.log2(total).swapaxes(1, 2), atol=1e-5)
        want, y = want * (inside / total)[..., None], y / total[..., None]
    assert_near(got, want + y, 2**-7)


@pytest.mark.parametrize("normalize", STAGES_ALONE)
def test_gradient(normalize):
    x, w, added = (normal(seed, BATCH, TOKENS, HEADS, 64) for seed in range(3))
    tiles, full = full_state(3)
    parts, z = two_parts(4)
    factor = normal(5, BATCH, HEADS, TOKENS, dtype=jnp.float32)
    extra = {"normalizer": parts, "factor": factor} if normalize else {}
    with interpreted():
        got, sums = jax.jit(lambda *args: gradient(PROBLEM, *args, want_sums=True, **extra))(x, w, tiles, added)
    half = np.einsum("bncha,bnaev,bnchv->bnche", by_chunk(x), full[:, 0], by_chunk(w)).reshape(x.shape)
    if normalize:
        zx = np.einsum("bncha,bnae->bnche", by_chunk(x), z[:, 0]).reshape(x.shape)
        half = half + zx * wide(factor).swapaxes(1, 2)[..., None]
    assert_near(got, wide(added) + 2 * half, 2**-7)
    assert_near(sums, (wide(x) * half).sum(-1).swapaxes(1, 2), 2**-7)


# Squared scores take a minute, and gradients half of one. In every run their stages are above and in
# test_linear_kernels.py, and together they are in triton/test_chunked.py.
WHOLE = [Case(150, "linear", normalize=False, edges=(50, 140))]
WHOLE += [Case(300, heads=(1, 1), edges=(100, 260))] if EXHAUSTIVE else []


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_outputs_states_and_gradients_equal_the_oracle(case):
    """All together, as the operation calls them: grouped heads, an odd length, states in and out."""
    with interpreted():
        run = case.results if EXHAUSTIVE else case.outputs
        got = run(chunk_size=256 if case.score == "squared" else 128)
    want = case.oracle()
    assert got.keys() == (want.keys() if EXHAUSTIVE else {"y", "kv", "key_sum"})
    for name, x in got.items():
        assert_near(x, want[name], 2**-6, name)
    assert_near(got["key_sum"], want["key_sum"], 1e-5)  # the normaliser is float32
