"""The quadratic kernels against the float64 oracle, through the Pallas interpreter: what every test here compares.

The bounds are those of `kernel_cases`. Measured on the cases below: errors of up to 1.7 of what SPREAD = 2.5 allows.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import pairwise
from support.exhaustive import EXHAUSTIVE
from support.kernel_cases import FINE, INPUTS, UNDERFLOWING, Case, assert_close, underflowing_call

from pallas_kernels.interpreter import interpreted

SCORES = ["linear", "squared", "exp"]

SETTINGS = {
    "score": SCORES,
    "normalize": [True, False],
    "decay": [True, False],
    "segments": [False, True],
    "heads": [(2, 1), (2, 2)],
}
if EXHAUSTIVE:
    SETTINGS |= {"head_dim": [64, 128], "tokens": [130, 1, 63]}
    CASES = [Case(batch=2 if settings["tokens"] == 63 else 1, **settings) for settings in pairwise(SETTINGS)]
else:  # what the two calls below, which most tests share, leave out
    CASES = [Case("linear", normalize=False, decay=False, head_dim=128, tokens=66)]
# The settings of most tests below, which compare with the oracle: calls that differ in numbers alone compile once.
SQUARED = Case(segments=True, tokens=160, batch=2, heads=(3, 3))
EXP = Case("exp", segments=True, tokens=66, heads=(1, 1))


@pytest.fixture(autouse=True)
def interpreter():
    with interpreted():
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_oracle(case):
    call = case.call()
    got = call.run()
    for name, x in got.items():
        like = call.q if name == "y" else getattr(call, name)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert_close(call, got)


@pytest.mark.parametrize("score", ["squared", "exp"] if EXHAUSTIVE else ["squared"])
def test_packed_documents_are_as_if_alone(score):
    """With edges at, just before and just after those of tiles, in outputs and gradients."""
    case = dataclasses.replace(SQUARED, score=score, segments=False)
    edges = [[0, 63, 65, 128, 160], [0, 64, 127, 129, 160]]
    ids = np.stack([np.searchsorted(row, np.arange(case.tokens), side="right") for row in edges])
    call = case.call().replace(segment_ids=jnp.asarray(ids))
    got = call.run()
    for row, starts in enumerate(edges):
        for start, end in itertools.pairwise(starts):
            place = np.s_[row : row + 1, start:end]
            alone = case.call().replace(**{name: np.asarray(getattr(call, name))[place] for name in (*INPUTS, "dy")})
            assert_close(alone, {name: np.asarray(x)[place] for name, x in got.items()})

    # Only one document of each row is asked for its gradients, and in the others other things are written.
    here = (ids == 2)[..., None]
    zero, fifty = call.q.dtype.type(0), call.q.dtype.type(50)
    q, k, v, dy = (np.asarray(getattr(call, name)) for name in ("q", "k", "v", "dy"))
    large = {name: np.where(here[..., None], x, fifty * x) for name, x in zip("qkv", (q, k, v))}
    only = call.replace(dy=np.where(here[..., None], dy, zero), **large).run()
    for name, x in only.items():
        mask = here if x.ndim == 3 else here[..., None]
        if name != "y":
            assert (np.asarray(x)[~np.broadcast_to(mask, x.shape)] == 0).all(), name
        np.testing.assert_array_equal(np.where(mask, x, 0), np.where(mask, got[name], 0), err_msg=name)


def test_a_document_that_reaches_beyond_a_tile():
    """Tiles of queries that see all of a tile of keys, then one that sees some, and the next document."""
    case = Case(tokens=256, heads=(1, 1))
    call = case.call().replace(segment_ids=jnp.asarray((np.arange(case.tokens) >= 230)[None].astype(np.int32)))
    assert_close(call, call.run())


DECAYS = ["none", "all -128", "one of -128", "one beyond -128", "mixed", "mixed otherwise"]


def extreme_decays(tokens):
    """[2, T, 3], a head of a row for each."""
    rng = np.random.default_rng(0)
    decays = np.zeros((len(DECAYS), tokens), np.float32)
    decays[1] = -128
    decays[2:4] = -rng.exponential(0.05, tokens)
    decays[2:4, tokens // 2] = -128, -1e6
    p = [0.3, 0.3, 0.2, 0.1, 0.05, 0.05]
    decays[4:] = rng.choice([0, -1e-6, -0.3, -5, -128, -1e6], p=p, size=(2, tokens))
    return jnp.asarray(decays.reshape(3, 2, tokens).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("score", "normalize", "segments"),
    [("squared", True, True), ("linear", False, False), ("exp", True, False)][: None if EXHAUSTIVE else 1],
)
def test_extreme_decays(score, normalize, segments):
    call = dataclasses.replace(SQUARED, score=score, normalize=normalize, segments=segments).call()
    if segments:  # one of -128 is to be inside a segment
        ids = call.options["segment_ids"]
        call = call.replace(segment_ids=jnp.asarray(np.stack([np.asarray(ids)[0]] * 2)))
    # Head 1 has in row 0 one decay of -128 and in row 1 one beyond, and the same of everything else.
    same = {name: np.array(getattr(call, name)) for name in ("q", "k", "v", "dy")}
    for x in same.values():
        x[1, :, 1] = x[0, :, 1]
    call = call.replace(log_decay=extreme_decays(160), **same)
    got = jax.tree.map(np.array, call.run())
    assert_close(call, got)
    if normalize:
        np.testing.assert_array_equal(got["y"][1, :, 0], call.v[1, :, 0])
    clamped = np.asarray(call.log_decay)[1, :, 1] < -128
    assert clamped.sum() == 1
    for name, x in got.items():
        beyond = x[1, :, 1]
        if name == "log_decay":
            assert (beyond[clamped] == 0).all()
            x[0, clamped] = 0
        np.testing.assert_array_equal(beyond, x[0, :, 1], err_msg=name)


@pytest.mark.quick
def test_rows_without_weight_are_zero_with_zero_gradients():
    call = SQUARED.call()
    rows = np.array([0, 17, 63, 64, 127, 128, 159])
    q, k = np.array(call.q), np.array(call.k)
    q[0, rows, 0] = q[0, :, 1] = k[1, :, 0] = 0
    call = call.replace(q=q, k=k)
    got = jax.tree.map(np.asarray, call.run())
    assert_close(call, got)
    for name in ("y", "q"):
        assert (got[name][0, rows, 0] == 0).all(), name
    for x in got.values():
        assert (x[0, :, 1] == 0).all()  # no query
        assert (x[1, :, 0] == 0).all()  # no key


@pytest.mark.parametrize("score", ["squared", "exp"] if EXHAUSTIVE else ["exp"])
def test_a_row_with_one_key_is_its_value(score):
    """Exactly; and t - <dy, y>, which dq is made of, is 0 to FINE of the lengths it is a difference of.

    The first document is that token alone.
    """
    first = np.array([0, 1, 40, 64])
    ids = np.searchsorted(first, np.arange(EXP.tokens), side="right")
    call = dataclasses.replace(EXP, score=score).call().replace(segment_ids=jnp.asarray(ids[None]))
    got = jax.tree.map(np.asarray, call.run())
    np.testing.assert_array_equal(got["y"][0, first], np.asarray(call.v)[0, first])
    dq, q, k, v, dy = (np.asarray(x)[0, first].astype(np.float64) for x in (got["q"], call.q, call.k, call.v, call.dy))
    x = (q * k).sum(-1, keepdims=True)
    slope_of_weight = {"linear": 1 / x, "squared": 2 / x, "exp": np.full_like(x, 64**-0.5)}[score]
    lengths = np.linalg.norm(dy, axis=-1, keepdims=True) * np.linalg.norm(v, axis=-1, keepdims=True)
    assert (np.abs(dq) <= 2 * FINE * lengths * np.abs(slope_of_weight * k)).all()


@pytest.mark.parametrize("score", ["squared", "exp"] if EXHAUSTIVE else ["squared"])
def test_the_largest_and_the_smallest_scores_of_the_contract(score):
    """From 2^-40 to 2^60, with keys before a query's tile; those of exp are beyond float32 from some hundreds on."""
    case = dataclasses.replace(EXP, score=score, tokens=136)
    call = case.call()
    q, k = abs(np.asarray(call.q)), abs(np.asarray(call.k))
    call = call.replace(q=q, k=k, segment_ids=np.zeros((1, case.tokens), int))
    scores = 64**-0.5 * np.einsum("bihd,bjd->bhij", q.astype(np.float64), k[:, :, 0].astype(np.float64))
    smallest, largest = -40 - np.floor(np.log2(scores.min())), 59 - np.floor(np.log2(scores.max()))
    for power in (smallest, 7 if score == "exp" else largest):
        scaled = call.replace(q=q * jnp.bfloat16(2.0**power))
        # A weight of exp has the rounding of its logit, which the two kernels of the gradient do not share.
        of_logits = 2.0**-23 * scores.max() * 2.0**power if score == "exp" else 0
        assert_close(scaled, scaled.run(), fine=max(2.0**-17, of_logits))
    if score == "exp":
        got = call.replace(q=q * jnp.bfloat16(2.0**largest)).run()
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())
        y, v = (np.asarray(x, np.float32)[0, :, 0] for x in (got["y"], call.v))
        assert (np.abs(y[:, None] - v).max(-1).min(1) == 0).all()  # a row is one of the values


@pytest.mark.parametrize("scale", [0.125, -0.125])
def test_rows_of_exp_with_enormous_scores_are_values(scale):
    """Without a decay, where compilers make one instruction of a product and a difference; scores are up to 2^60."""
    call = dataclasses.replace(EXP, decay=False, segments=False, tokens=136).call()
    got = call.replace(q=call.q * jnp.bfloat16(2.0**56), scale=scale).run()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())
    y, v = (np.asarray(x, np.float32) for x in (got["y"], call.v))
    assert (abs(y[:, :, None] - v[:, None]).max(-1).min(2) == 0).all()


@pytest.mark.parametrize("kind", UNDERFLOWING)
def test_a_decay_that_underflows_gives_no_nan_and_no_infinity(kind):
    call = underflowing_call(kind, "mosaic_gpu")
    assert_close(call, call.run())
