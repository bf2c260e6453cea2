"""Each point of the numerics contract (docs/numerics.md)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.cases import Case
from support.exhaustive import EXHAUSTIVE
from support.ladder import LADDER, ladder_inputs, relative_rms

from twomamba_jax import decay_attention, decay_attention_step, init_state
from twomamba_jax.ops.decay import pairwise_decay, pairwise_log_decay
from twomamba_jax.ops.forms import stages
from twomamba_jax.ops.numerics import divide
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.state import FiniteState

FORMS = ["parallel", "chunked", "recurrent"]
EPS = np.finfo(np.float32).eps


@functools.partial(jax.jit, static_argnames=("form", "score", "scale", "chunk_size", "precision"))
def attend(
    form, q, k, v, log_decay=None, *, score="squared", scale=None, segment_ids=None, chunk_size=16, precision=None
):
    return decay_attention(
        *(q, k, v, log_decay),
        score=score,
        scale=scale,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size if form == "chunked" else None,
        precision=precision,
    )


@functools.partial(jax.jit, static_argnames=("form", "score", "scale"))
def attend_and_pull(form, dy, inputs, segment_ids=None, *, score, scale=None):
    """y, and the gradients of <dy, y> by q, k, v and log_decay. Tests with inputs of one shape share a program."""
    y, pull = jax.vjp(lambda *x: attend(form, *x, score=score, scale=scale, segment_ids=segment_ids), *inputs)
    return y, pull(dy)


SHARED = {"tokens": 40, "head_dim": 5}  # the shape of what most tests of gradients below give to `attend_and_pull`


# Point 1: dtypes.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
def test_outputs_have_the_dtype_of_q_and_states_are_float32_or_wider(score, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        arrays = Case(score=score, tokens=9).arrays()
        inputs = [jnp.asarray(arrays[name], dtype) for name in ("q", "k", "v")]
        log_decay = jnp.asarray(arrays["log_decay"], jnp.float32)
        call = functools.partial(decay_attention, score=score, return_final_state=True)
        y, state = jax.eval_shape(call, *inputs, log_decay)
        assert y.dtype == dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        expected = [dtype, dtype, wide, jnp.int32, jnp.int32] if score == "exp" else [wide, wide]
        assert [leaf.dtype for leaf in state] == expected


@pytest.mark.parametrize("form", FORMS)
def test_squared_float16_scores_past_256_do_not_overflow(form):
    """x = 400, so that x^2 = 160,000 is past float16's 65,504."""
    q = k = np.full((1, 20, 1, 4), 20.0, np.float16)
    v = np.random.default_rng(0).normal(size=(1, 20, 1, 3)).astype(np.float16)
    y = attend(form, q, k, v, scale=0.25)
    want, _ = oracle.forward(q, k, v, score="squared", normalize=True, scale=0.25)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=2 * np.finfo(np.float16).eps)


# Point 2: decays are differences that restart in every chunk.


def test_decays_stay_exact_over_131072_tokens():
    """A running float32 sum would be off by 1.2 % here; the last output must keep 1e-5."""
    tokens, decay = 131_072, 0.7
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(1, tokens, 1, 2)).astype(np.float32) for _ in range(2))
    log_decay = np.full((1, tokens, 1), -decay, np.float32)
    y = attend("chunked", k, k, v, log_decay, chunk_size=1024)
    # exp(-0.7 * 400) is 1e-122: the last 400 tokens are all that the last one sees.
    tail = slice(-400, None)
    want, _ = oracle.forward(k[:, tail], k[:, tail], v[:, tail], log_decay[:, tail], score="squared", normalize=True)
    kappa = oracle.kappa(k[:, tail], k[:, tail], log_decay[:, tail])[0, -1, 0]
    error = np.abs(np.asarray(y[0, -1, 0], np.float64) - want[0, -1, 0]).max()
    assert error <= 5 * EPS * kappa * np.abs(v).max()
    assert 5 * EPS * kappa < 1e-5  # so the bound tells a right sum from a running one


@pytest.mark.parametrize("size", [1, 31, 32, 33, 200, 1100] if EXHAUSTIVE else [33, 1100])
def test_pairwise_decays_equal_their_sums(size):
    """To a few eps of themselves even after decays of -128, where a difference of prefix sums loses 1e-5 and more."""
    rng = np.random.default_rng(0)
    a = np.where(rng.random(size) < 0.1, -128, -rng.random(size) * 0.1).astype(np.float32)
    log_decay, decay = jax.jit(lambda a: (pairwise_log_decay(a), pairwise_decay(a)))(a)
    got = np.tril(np.asarray(log_decay, np.float64))
    wide = a.astype(np.float64)
    later = np.tril(np.ones((size, size)), -1)  # [t, j]: t > j
    want = (wide[:, None] * later).cumsum(0)  # [i, j]: the sum over j < t <= i
    assert (np.abs(got - want) <= 16 * EPS * np.abs(want)).all()
    decay = np.asarray(decay, np.float64)
    assert (decay == np.tril(decay)).all()
    # x e^-x <= 0.37: a relative error of the exponent is a smaller, absolute one of the decay.
    assert (np.abs(decay - np.tril(np.exp(want))) <= 16 * EPS).all()


@pytest.mark.parametrize("form", FORMS)
def test_strong_decays_act_as_128_and_spoil_nothing_after_them(form):
    arrays = Case(**SHARED, segments=True).arrays(np.float32)
    strong = np.random.default_rng(1).random(arrays["log_decay"].shape) < 0.1
    inputs = [arrays[name] for name in ("q", "k", "v")]
    segment_ids = arrays["segment_ids"]
    limit = np.where(strong, np.float32(-128), arrays["log_decay"])
    ones = np.ones((*inputs[0].shape[:3], inputs[2].shape[-1]), np.float32)

    def outputs_and_gradient(log_decay):
        y, gradients = attend_and_pull(form, ones, (*inputs, log_decay), segment_ids, score="squared")
        return y, gradients[3]

    y, _ = outputs_and_gradient(limit)
    for stronger in (-1e4, -1e30, -np.inf):
        beyond = np.where(strong, np.float32(stronger), arrays["log_decay"])
        same, gradient = outputs_and_gradient(beyond)
        np.testing.assert_array_equal(same, y)
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[strong] == 0).all()
    want, _ = oracle.forward(*inputs, limit, score="squared", normalize=True, segment_ids=arrays["segment_ids"])
    kappa = oracle.kappa(inputs[0], inputs[1], limit, segment_ids=arrays["segment_ids"])
    error = np.abs(np.asarray(y, np.float64) - want).max(-1)
    assert (error <= 5 * EPS * kappa * np.abs(inputs[2]).max()).all()


# Squared scores in every form, and exp in chunks; in an exhaustive run all in all.
SCORES_AND_FORMS = [("squared", form) for form in FORMS] + [("exp", "chunked")]
if EXHAUSTIVE:
    SCORES_AND_FORMS += [("linear", form) for form in FORMS] + [("exp", "parallel")]


@pytest.mark.parametrize(("score", "form"), SCORES_AND_FORMS)
def test_nothing_crosses_a_boundary(score, form):
    """No output and no gradient, exactly: tokens of one segment see bitwise nothing of the others."""
    arrays = Case(score=score, **SHARED).arrays(np.float32)
    inputs = tuple(arrays[name] for name in ("q", "k", "v", "log_decay"))
    segment_ids = np.repeat([[4, 9, 4]], 3, 0)[:, np.repeat([0, 1, 2], [13, 20, 7])]
    middle = slice(13, 33)
    dy = np.zeros((*inputs[0].shape[:3], inputs[2].shape[-1]), np.float32)
    dy[:, middle] = np.random.default_rng(0).normal(size=dy[:, middle].shape)
    clean, gradients = attend_and_pull(form, dy, inputs, segment_ids, score=score)
    for gradient in gradients:
        outside = np.delete(np.asarray(gradient), np.arange(13, 33), axis=1)
        assert (outside == 0).all()
        assert np.abs(np.asarray(gradient)[:, middle]).max() > 0
    poisoned = tuple(np.array(x) for x in inputs)
    for x in poisoned:
        x[:, :13] = -3e3 if x.ndim == 3 else 3e3
    dirty, _ = attend_and_pull(form, dy, poisoned, segment_ids, score=score)
    np.testing.assert_array_equal(np.asarray(dirty)[:, 13:], np.asarray(clean)[:, 13:])


# Point 3: zero denominators, and the range of scores.


@pytest.mark.parametrize(("score", "form"), [pair for pair in SCORES_AND_FORMS if pair[0] != "exp"])
def test_rows_without_weight_are_zero_with_zero_gradients(score, form):
    arrays = Case(score=score, **SHARED).arrays(np.float32)
    q, k, v, log_decay = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    rows = [0, 17, 39]
    q[:, rows] = 0
    dy = np.zeros((*q.shape[:3], v.shape[-1]), np.float32)
    dy[:, rows] = 3
    one_segment = np.zeros(q.shape[:2], int)
    y, gradients = attend_and_pull(form, dy, (q, k, v, log_decay), one_segment, score=score)
    assert (np.asarray(y)[:, rows] == 0).all()
    assert (np.abs(np.delete(y, rows, axis=1)).max(-1) > 0).all()
    assert all((np.asarray(gradient) == 0).all() for gradient in gradients)


@pytest.mark.parametrize("exponent", [-101, -99])
def test_denominators_below_two_to_the_minus_100_count_as_zero(exponent):
    q, k, v = (np.full((1, 1, 1, 1), x, np.float32) for x in (1, 1, 3))
    for score, scale in (("squared", 2.0 ** (exponent / 2)), ("linear", 2.0**exponent)):
        y = attend("parallel", q, k, v, score=score, scale=scale)
        np.testing.assert_allclose(y, 0 if exponent < -100 else 3, rtol=1e-6)


# Both scores, and squared ones in chunks, which sum up the largest numbers.
RANGES = [("linear", "parallel", jnp.float32), ("squared", "chunked", jnp.bfloat16)]
if EXHAUSTIVE:
    RANGES = list(itertools.product(["linear", "squared"], FORMS, [jnp.float32, jnp.bfloat16]))


@pytest.mark.parametrize("exponent", [-40, 60])
@pytest.mark.parametrize(("score", "form", "dtype"), RANGES)
def test_scores_from_two_to_minus_40_to_60_stay_finite(score, exponent, dtype, form):
    """Outputs and gradients, with 600 tokens of equal score: 600 * 2^120 is past float32."""
    tokens = 600 if form != "recurrent" else 60
    rng = np.random.default_rng(0)
    half = 2.0 ** (exponent / 2)
    q, k = (np.full((1, tokens, 1, 1), half).astype(dtype) for _ in range(2))
    q[:, ::7] = 0
    v = rng.normal(size=(1, tokens, 1, 2)).astype(dtype)
    log_decay = (-rng.random((1, tokens, 1)) * 0.01).astype(np.float32)

    ones = np.ones((1, tokens, 1, 2), dtype)
    y, gradients = attend_and_pull(form, ones, (q, k, v, log_decay), score=score, scale=1.0)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (y, *gradients))
    want, _ = oracle.forward(q, k, v, log_decay, score=score, normalize=True, scale=1.0)
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=tolerance)


def test_division_keeps_its_derivative_where_the_square_of_a_denominator_leaves_float32():
    gradients = jax.jit(jax.grad(lambda n, d: divide(n, d, 2.0**-100).sum(), argnums=(0, 1)))
    for exponent in (-90, 100):
        numerator, denominator = (np.full(n, x * 2.0**exponent, np.float32) for n, x in (((1, 2), 3), ((1,), 1)))
        dn, dd = gradients(numerator, denominator)
        np.testing.assert_allclose(dn, 2.0**-exponent)
        np.testing.assert_allclose(dd, -6 * 2.0**-exponent)


def test_what_the_state_adds_to_a_denominator_is_never_negative():
    op = Operation("squared", True, 1.0)
    state = FiniteState(jnp.ones((1, 1, 3, 1)), jnp.array([[[-1.0, -2.0, 0.5]]]))
    sums = stages.query(op, jnp.ones((1, 1, 1, 1, 2)), None, None, state)
    np.testing.assert_array_equal(sums.denominator, 0)


# Point 4: conditioning.


RUNGS = LADDER if EXHAUSTIVE else LADDER[:: len(LADDER) - 1]  # or the first and the last


@pytest.mark.parametrize(("share", "allowed"), RUNGS)
def test_conditioning_ladder_in_bfloat16(share, allowed):
    """The default loses digits as q leaves the keys' subspace; precision='highest' loses none."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in ladder_inputs(share))
    want, _ = oracle.forward(q, k, v, score="squared", normalize=True)
    # Only the second half of the rows leans on the state.
    by_default, at_highest = (
        np.asarray(attend("chunked", q, k, v, chunk_size=64, precision=precision)) for precision in (None, "highest")
    )
    default, highest = (relative_rms(y[:, 256:], want[:, 256:]) for y in (by_default, at_highest))
    assert default < allowed
    assert highest < 2.5e-3  # the rounding of the output to bf16: 1.7e-3 at every rung


@pytest.mark.parametrize("form", ["chunked", "recurrent"] if EXHAUSTIVE else ["chunked"])
@pytest.mark.parametrize("share", [share for share, _ in RUNGS])
def test_conditioning_ladder_in_float32(share, form):
    """Each row's error is at most 5 eps kappa_i max|v|."""
    size, tokens = (8, 256) if form == "recurrent" else (64, 512)
    q, k, v = (x.astype(np.float32) for x in ladder_inputs(share, tokens, size, size // 2))
    want, _ = oracle.forward(q, k, v, score="squared", normalize=True)
    error = np.abs(np.asarray(attend(form, q, k, v), np.float64) - want).max(-1)
    assert (error <= 5 * EPS * oracle.kappa(q, k) * np.abs(v).max()).all()


def test_the_current_token_is_attended_directly():
    """A query whose only key is its own, nearly orthogonal to it: from features its weight would have lost its digits.

    The direct weight keeps y = v to a few eps whatever the angle.
    """
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 1, 64)).astype(np.float32)
    k = rng.normal(size=(1, 1, 64)).astype(np.float32)
    k -= (q * k).sum() / (q * q).sum() * q * (1 - 1e-3)
    v = rng.normal(size=(1, 1, 8)).astype(np.float32)
    state = init_state("squared", 1, 1, 64, 8)
    step = jax.jit(functools.partial(decay_attention_step, score="squared", normalize=True))
    y, _ = step(q, k, v, None, state)
    np.testing.assert_allclose(y, v, rtol=4 * EPS)


# Point 6: arrays of more than 2^31 elements.


@pytest.mark.skipif(not EXHAUSTIVE, reason="half a minute and 12 GiB: see exhaustive.py; kernels have theirs on a GPU")
def test_more_than_two_to_the_31_elements():
    """Every head is given the same queries, so each must equal the one head that is computed alone."""
    tokens, heads, size = 256, 32800, 256
    memory = available_memory()
    if memory < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free memory, found {memory / 2**30:.1f}")
    assert tokens * heads * size > 2**31
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.random((1, tokens, 1, size)), jnp.bfloat16)
    k = jnp.asarray(rng.random((1, tokens, 1, size)), jnp.bfloat16)
    v = jnp.asarray(rng.normal(size=(1, tokens, 1, 1)), jnp.bfloat16)

    @jax.jit
    def attend_all(q, k, v):
        return decay_attention(q, k, v, score="linear", form="chunked", chunk_size=16)

    y = attend_all(jnp.tile(q, (1, 1, heads, 1)), k, v)
    one = attend_all(q, k, v)
    for head in (0, heads // 2, heads - 1):
        np.testing.assert_array_equal(y[:, :, head], one[:, :, 0])


def available_memory() -> int:
    """Bytes that can be allocated now (0 where the system does not tell)."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 0
