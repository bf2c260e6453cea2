"""The chunked kernels in Triton, each against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.triton  # noqa: F401 (before triton)
from support.chunked_cases import Case, assert_near, normal, wide
from support.chunked_scans import STARTS, check_parts, check_products, check_states
from support.chunked_stages import BATCH, CHUNK, CHUNKS, GROUPS, HEADS, PAIRS, TOKENS, by_chunk, full_state, two_parts
from support.exhaustive import EXHAUSTIVE, exhaustive

from pallas_kernels.chunked.problem import Problem, Tiles
from pallas_kernels.triton.chunked import linear_gradient, linear_query, linear_update
from pallas_kernels.triton.chunked.gradient import gradient
from pallas_kernels.triton.chunked.normalizer import normalizer
from pallas_kernels.triton.chunked.query import query
from pallas_kernels.triton.chunked.scan import scan
from pallas_kernels.triton.chunked.update import update

together = exhaustive("test_the_form_equals_the_oracle, in which the stages of squared scores meet")
PROBLEM = Problem(BATCH, TOKENS, HEADS, GROUPS, CHUNK, Tiles(), True)


@together
def test_squared_update():
    x, w = normal(0, BATCH, TOKENS, HEADS, 64), normal(1, BATCH, TOKENS, HEADS, 64)
    got = jax.jit(lambda x, w: update(PROBLEM, x, w))(x, w)
    features = by_chunk(x)[..., PAIRS].prod(-1)
    want = np.einsum("bnchtr,bnchv->bntrv", features, by_chunk(w))[:, None]
    assert_near(got, want, 2**-8)


@pytest.mark.parametrize("weighted", [True, False])
def test_squared_normalizer(weighted):
    """Of factors of both signs, to float32 or nearly so."""
    x = normal(0, BATCH, TOKENS, HEADS, 64)
    factor = normal(1, BATCH, HEADS, TOKENS, dtype=jnp.float32) if weighted else None
    got = jax.jit(lambda x: normalizer(PROBLEM, x, factor))(x)
    factors = by_chunk(factor.swapaxes(1, 2))[..., 0] if weighted else np.ones((BATCH, CHUNKS, CHUNK, HEADS))
    want = np.einsum("bnch,bncha,bnche->bnae", factors, by_chunk(x), by_chunk(x))[:, None]
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize(("reverse", "starts"), STARTS)
def test_scan(reverse, starts):
    check_states(scan, reverse, starts)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_a_sum_of_two(reverse):
    check_parts(scan, reverse)


@pytest.mark.parametrize("counted", [False, True])
def test_scan_with_inner_products(counted):
    check_products(scan, counted)


@together
@pytest.mark.parametrize(("normalize", "weighted"), [(True, True), (False, False), (True, False), (False, True)])
def test_squared_query(normalize, weighted):
    x, added = normal(0, BATCH, TOKENS, HEADS, 64), normal(1, BATCH, TOKENS, HEADS, 64)
    tiles, full = full_state(2)
    parts, z = two_parts(3)
    weight = abs(normal(4, BATCH, GROUPS, TOKENS, dtype=jnp.float32))
    own_norm = normal(5, BATCH, HEADS, TOKENS, dtype=jnp.float32) + 8
    extra = {"normalizer": parts, "own_norm": own_norm} if normalize else {}
    run = jax.jit(lambda *args: query(PROBLEM, *args, power=0.5, **extra))
    got = run(x, tiles, weight if weighted else None, added)
    weight = wide(weight) if weighted else np.ones(weight.shape)
    xs = by_chunk(x) / 2
    y = np.einsum("bncha,bnche,bnaev->bnchv", xs, xs, full[:, 0]).reshape(added.shape)
    y, want = y * weight[:, 0, :, None, None], wide(added)
    if normalize:
        through = np.einsum("bncha,bnche,bnae->bnch", xs, xs, z[:, 0]).reshape(BATCH, TOKENS, HEADS)
        inside = 2 ** wide(own_norm).swapaxes(1, 2)
        total = inside + through * weight[:, 0, :, None]
        got, norm = got
        np.testing.assert_allclose(norm, np.log2(total).swapaxes(1, 2), atol=1e-5)
        want, y = want * (inside / total)[..., None], y / total[..., None]
    assert_near(got, want + y, 2**-7)


@together
@pytest.mark.parametrize("normalize", [True, False])
def test_squared_gradient(normalize):
    x, w, added = (normal(seed, BATCH, TOKENS, HEADS, 64) for seed in range(3))
    tiles, full = full_state(3)
    parts, z = two_parts(4)
    factor = normal(5, BATCH, HEADS, TOKENS, dtype=jnp.float32)
    extra = {"normalizer": parts, "factor": factor} if normalize else {}
    got, sums = jax.jit(lambda *args: gradient(PROBLEM, *args, want_sums=True, **extra))(x, w, tiles, added)
    half = np.einsum("bncha,bnaev,bnchv->bnche", by_chunk(x), full[:, 0], by_chunk(w)).reshape(x.shape)
    if normalize:
        zx = np.einsum("bncha,bnae->bnche", by_chunk(x), z[:, 0]).reshape(x.shape)
        half = half + zx * wide(factor).swapaxes(1, 2)[..., None]
    assert_near(got, wide(added) + 2 * half, 2**-7)
    assert_near(sums, (wide(x) * half).sum(-1).swapaxes(1, 2), 2**-7)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("weighted", [(True, True), (True, False), (False, True)])
def test_linear_update(dim, weighted):
    x, w = normal(0, BATCH, TOKENS, HEADS, dim), normal(1, BATCH, TOKENS, HEADS, dim)
    weight, factor = (
        normal(2 + i, BATCH, HEADS, TOKENS, dtype=jnp.float32) if has else None for i, has in enumerate(weighted)
    )
    s, z = jax.jit(lambda x, w: linear_update.update(PROBLEM, x, w, weight, factor=factor))(x, w)

    def of_tokens(vector):
        return np.ones((BATCH, CHUNKS, CHUNK, HEADS)) if vector is None else by_chunk(vector.swapaxes(1, 2))[..., 0]

    want = np.einsum("bnch,bnchk,bnchv->bnkv", of_tokens(weight), by_chunk(x), by_chunk(w))
    assert_near(s, want[:, None], 2**-8)
    want = np.einsum("bnch,bnchk->bnk", of_tokens(weight if factor is None else factor), by_chunk(x))
    assert_near(z, want[:, None], 1e-5)


@pytest.mark.parametrize(("dim", "normalize", "weighted"), [(64, False, False), (64, True, True), (128, True, False)])
def test_linear_query(dim, normalize, weighted):
    x, added = abs(normal(0, BATCH, TOKENS, HEADS, dim)), normal(1, BATCH, TOKENS, HEADS, dim)
    state = normal(2, BATCH, GROUPS, CHUNKS, dim, dim)
    z = abs(normal(3, BATCH, GROUPS, CHUNKS, dim, dtype=jnp.float32))
    weight = abs(normal(4, BATCH, GROUPS, TOKENS, dtype=jnp.float32))
    own_norm = normal(5, BATCH, HEADS, TOKENS, dtype=jnp.float32) + 8
    extra = {"normalizer": z, "own_norm": own_norm} if normalize else {}
    run = jax.jit(lambda *args: linear_query.query(PROBLEM, *args, power=0.5, **extra))
    got = run(x, state, weight if weighted else None, added)
    weight = wide(weight) if weighted else np.ones(weight.shape)
    y = np.einsum("bnchk,bnkv->bnchv", by_chunk(x) / 2, wide(state)[:, 0]).reshape(added.shape)
    y, want = y * weight[:, 0, :, None, None], wide(added)
    if normalize:
        through = np.einsum("bnchk,bnk->bnch", by_chunk(x) / 2, wide(z)[:, 0]).reshape(BATCH, TOKENS, HEADS)
        inside = 2 ** wide(own_norm).swapaxes(1, 2)
        total = inside + through * weight[:, 0, :, None]
        got, norm = got
        np.testing.assert_allclose(norm, np.log2(total).swapaxes(1, 2), atol=1e-5)
        want, y = want * (inside / total)[..., None], y / total[..., None]
    assert_near(got, want + y, 2**-7)


def test_a_mapped_axis_is_more_batch():
    x, added = (normal(seed, 3, BATCH, TOKENS, HEADS, 64) for seed in (0, 1))
    state = normal(2, BATCH, GROUPS, CHUNKS, 64, 64)
    run = functools.partial(linear_query.query, PROBLEM)
    got = jax.jit(jax.vmap(lambda x, added: run(x, state, None, added)))(x, added)
    np.testing.assert_array_equal(got, jnp.stack([run(x[i], state, None, added[i]) for i in range(3)]))


def test_a_mapped_scan_has_the_products_of_every_row():
    added, other = (normal(seed, 2, 1, 2, 3, 2, 64, 64, dtype=jnp.float32) for seed in (0, 2))
    weight = abs(normal(1, 2, 1, 2, 3, dtype=jnp.float32))
    counts = jnp.asarray([[1, 2, 2, 1], [2, 1, 3, 2]], jnp.float32)

    def run(added, weight, other):
        return scan(added, weight, None, other=other, counts=counts)

    want = [jnp.stack(rows) for rows in zip(*(run(added[i], weight[i], other[i]) for i in range(2)))]
    for got, alone in zip(jax.jit(jax.vmap(run))(added, weight, other), want, strict=True):
        np.testing.assert_array_equal(got, alone)


def test_a_row_without_weights_is_zero():
    """Its denominator is 0 both inside its chunk and through the state."""
    x = normal(0, BATCH, TOKENS, HEADS, 64).at[:, 1].set(0)
    own_norm = jnp.zeros((BATCH, HEADS, TOKENS), jnp.float32).at[..., 1].set(jnp.inf)
    z = jnp.ones((BATCH, GROUPS, CHUNKS, 64), jnp.float32)
    state = normal(2, BATCH, GROUPS, CHUNKS, 64, 64)
    y, norm = linear_query.query(PROBLEM, x, state, None, x, normalizer=z, own_norm=own_norm, floor=2.0**-100)
    assert (y[:, 1] == 0).all()
    assert (norm[..., 1] == jnp.inf).all()
    assert jnp.isfinite(y).all()


@pytest.mark.parametrize(("dim", "normalize"), [(64, False), (64, True), (128, True)])
def test_linear_gradient(dim, normalize):
    x, w, added = (normal(seed, BATCH, TOKENS, HEADS, dim) for seed in range(3))
    state = normal(3, BATCH, GROUPS, CHUNKS, dim, dim)
    z = normal(4, BATCH, GROUPS, CHUNKS, dim, dtype=jnp.float32)
    weight, factor = (normal(seed, BATCH, HEADS, TOKENS, dtype=jnp.float32) for seed in (5, 6))
    extra = {"normalizer": z, "factor": factor} if normalize else {}
    run = jax.jit(lambda *args: linear_gradient.gradient(PROBLEM, *args, want_sums=True, **extra))
    got, sums = run(x, w, weight, state, added)
    dx = np.einsum("bnkv,bnchv->bnchk", wide(state)[:, 0], by_chunk(w)).reshape(x.shape)
    dx = dx * wide(weight).swapaxes(1, 2)[..., None]
    if normalize:
        of_z = np.broadcast_to(wide(z)[:, 0, :, None, None], (BATCH, CHUNKS, CHUNK, HEADS, dim)).reshape(x.shape)
        dx = dx + of_z * wide(factor).swapaxes(1, 2)[..., None]
    assert_near(got, wide(added) + dx, 2**-7)
    assert_near(sums, (wide(x) * dx).sum(-1).swapaxes(1, 2), 2**-7)


# Decays so weak that the states' products, which only their gradient has, are a good part of it.
WHOLE = [Case(150, "linear", heads=(2, 1), edges=(140,)), Case(150, heads=(1, 1), strength=0.003)]
WHOLE += [Case(300, heads=(1, 1), edges=(290,))] if EXHAUSTIVE else []


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_the_form_equals_the_oracle(case):
    """Outputs, states and every gradient, by way of the operation."""
    got, want = case.results(jax.jit, "triton", chunk_size=128), case.oracle()
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_near(x, want[name], 2**-6, name)
