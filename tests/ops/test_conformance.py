"""The suite that every (form, implementation) of `decay_attention` passes: a new kernel adds a row to `FORMS`.

In float64, outputs, final states and every gradient equal the NumPy oracle's to 1e-9 of their largest entry, over a set
of cases in which every pair of settings occurs, the form being one of them; in an exhaustive run (see exhaustive.py)
every form has all the cases of settings. In float32 each row keeps the bound of the numerics contract.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.cases import Case, pairwise
from support.exhaustive import EXHAUSTIVE

from twomamba_jax import FiniteState, KeyValueCache, decay_attention, decay_attention_step

FORMS = [("parallel", "xla"), ("chunked", "xla"), ("recurrent", "xla")]

SETTINGS = {
    "score": ["linear", "squared", "exp"],
    "normalize": [True, False],
    "decay": [True, False],
    "segments": [False, True],
    "lengths": [False, True],
    "heads": [(4, 2), (2, 2)],
    "initial_state": [True, False],
    "head_dim": [5, 8],
    "tokens": [1, 2, 63, 500] if EXHAUSTIVE else [63],  # four chunks, the last of an odd length
}


def supported(settings: dict) -> bool:
    return (settings["score"], settings["row"][0]) != ("exp", "recurrent")


def case_of(row, **settings):
    return Case(**settings), *row


CHOICES = [{"row": row} | settings for settings in pairwise(SETTINGS) for row in FORMS]
CHOICES = [case_of(**choice) for choice in (CHOICES if EXHAUSTIVE else pairwise({"row": FORMS} | SETTINGS, supported))]
# What of one token there is to see: what a state before it does.
ONE = {"tokens": 1, "heads": (4, 2), "head_dim": 5, "initial_state": True}
SINGLE = [(Case(score, **ONE), *FORMS[0]) for score in ("squared", "exp")]


def run(case: Case, form: str, implementation: str, dtype, arrays, dy=None, dstate=None):
    """y, the final state, and the gradients for the cotangents (none without dy), of the case's arrays in `dtype`."""

    def cast(x):
        return None if x is None else jnp.asarray(x, dtype)

    q, k, v, log_decay = (cast(arrays[name]) for name in ("q", "k", "v", "log_decay"))
    rows = {name: None if arrays[name] is None else jnp.asarray(arrays[name]) for name in ("segment_ids", "lengths")}
    state, counters = arrays["state"], {}
    if state is not None:
        if case.score == "exp":
            counters = {name: jnp.asarray(state[name]) for name in ("start", "length")}
            state = KeyValueCache(*(cast(state[name]) for name in ("keys", "values", "log_decay")), None, None)
        else:
            state = FiniteState(*map(cast, state))

    def operation(q, k, v, log_decay, state):
        if counters:
            state = state._replace(**counters)
        return decay_attention(
            q,
            k,
            v,
            log_decay,
            score=case.score,
            normalize=case.normalize,
            initial_state=state,
            return_final_state=True,
            form=form,
            chunk_size=16 if form == "chunked" else None,
            implementation=implementation,
            **rows,
        )

    inputs = (q, k, v, log_decay, state)
    if dy is None:
        return *jax.jit(operation)(*inputs), {}

    def loss(*inputs):
        y, final = operation(*inputs)
        total = (y * cast(dy)).sum()
        if dstate is not None:
            total += (final.kv * cast(dstate[0])).sum() + (final.key_sum * cast(dstate[1])).sum()
        return total, (y, final)

    # One program for both directions: compilation is nearly all of the time.
    gradients, (y, final) = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*inputs)
    *gradients, dinitial = gradients
    named = dict(zip(("q", "k", "v", "log_decay"), gradients))
    if dinitial is not None:
        finite, cached = ("kv", "key_sum"), ("keys", "values", "log_decay")
        names = cached if case.score == "exp" else finite
        named |= {f"initial_{name}": getattr(dinitial, name) for name in names}
    return y, final, {name: value for name, value in named.items() if value is not None}


def relative_error(got, want):
    """Largest difference over largest magnitude."""
    want = np.asarray(want, np.float64)
    scale = np.abs(want).max(initial=0)
    return float(np.abs(np.asarray(got, np.float64) - want).max(initial=0) / (scale or 1))


def test_exp_has_no_recurrent_form():
    case = Case(score="exp", tokens=2)
    with pytest.raises(ValueError, match="needs a finite state"):
        run(case, "recurrent", "xla", jnp.float32, case.arrays())


@pytest.mark.parametrize(("case", "form", "implementation"), [*CHOICES, *([] if EXHAUSTIVE else SINGLE)], ids=str)
def test_equals_the_oracle_in_float64(case, form, implementation):
    arrays = case.arrays()
    inputs = (arrays["q"], arrays["k"], arrays["v"], arrays["log_decay"])
    options = {
        "score": case.score,
        "normalize": case.normalize,
        "segment_ids": arrays["segment_ids"],
        "lengths": arrays["lengths"],
        "initial_state": arrays["state"],
    }
    want, want_final = oracle.forward(*inputs, **options)
    rng = np.random.default_rng(7)
    dy = rng.normal(size=want.shape)
    dstate = None if case.score == "exp" else tuple(rng.normal(size=x.shape) for x in want_final)
    want_gradients = oracle.gradients(dy, dstate, *inputs, **options)

    with jax.enable_x64(True):
        y, final, gradients = run(case, form, implementation, jnp.float64, arrays, dy, dstate)
    assert relative_error(y, want) < 1e-9
    assert_same_state(final, want_final)
    assert gradients.keys() == want_gradients.keys()
    for name, value in want_gradients.items():
        assert relative_error(gradients[name], value) < 1e-9, name


def assert_same_state(got, want, bound=1e-9):
    if isinstance(got, FiniteState):
        assert relative_error(got.kv, want[0]) < bound
        assert relative_error(got.key_sum, want[1]) < bound
        return
    for name in ("start", "length"):
        np.testing.assert_array_equal(getattr(got, name), want[name])
    used = np.arange(got.keys.shape[2]) < want["length"][:, None]
    for name in ("keys", "values", *(["log_decay"] if got.log_decay is not None else [])):
        ours, theirs = (np.moveaxis(np.asarray(x), 2, 1)[used] for x in (getattr(got, name), want[name]))
        assert relative_error(ours, theirs) < bound


# In every form normalised squared scores, whose bound is the narrow one; others in exhaustive runs.
LONG = [(Case(), *row) for row in FORMS]
if EXHAUSTIVE:
    LONG += [choice for choice in CHOICES if choice[0].tokens > 2 and choice[1] != "parallel"]


@pytest.mark.parametrize(("case", "form", "implementation"), LONG, ids=str)
def test_keeps_the_bound_of_each_row_in_float32(case, form, implementation):
    """|error of row i| <= c eps kappa_i max|v|, c < 5, for normalised squared scores; for the others kappa is 1.

    The bound is that of the row's own products; decays and sums add a few eps each, which c covers.
    """
    arrays = case.arrays(np.float32)
    inputs = (arrays["q"], arrays["k"], arrays["v"], arrays["log_decay"])
    rows = {"segment_ids": arrays["segment_ids"], "lengths": arrays["lengths"]}
    options = {"score": case.score, "normalize": case.normalize, "initial_state": arrays["state"], **rows}
    want, _ = oracle.forward(*inputs, **options)
    y, _, _ = run(case, form, implementation, jnp.float32, arrays)
    assert y.dtype == jnp.float32
    error = np.abs(np.asarray(y, np.float64) - want).max(-1)
    eps = np.finfo(np.float32).eps
    if case.normalize and case.score == "squared" and arrays["state"] is None:
        kappa = oracle.kappa(arrays["q"], arrays["k"], arrays["log_decay"], **rows)
        bound = 5 * eps * np.where(np.isfinite(kappa), kappa, 1) * np.abs(arrays["v"]).max()
    else:
        # Sums of up to T terms, relative to the largest row: what any order of summation keeps.
        bound = eps * np.sqrt(case.tokens) * 40 * np.abs(want).max()
    assert (error <= bound).all(), (error / bound).max()


PARTS = [("squared", FORMS[2]), ("exp", FORMS[0])]  # each kind of state


@pytest.mark.parametrize(
    ("score", "row"),
    [
        (score, row)
        for score, row in itertools.product(SETTINGS["score"], FORMS)
        if supported({"score": score, "row": row})
    ]
    if EXHAUSTIVE
    else PARTS,
    ids=str,
)
def test_calls_with_the_state_between_are_one(score, row):
    """Outputs and gradients of parts, each continuing the state of the one before, equal the oracle's of the whole.

    What a finite state and its gradient are to a call is compared above; here alone gradients go through a cache.
    """
    form, implementation = row
    cuts = [0, 1, 30, 62, 63] if EXHAUSTIVE else [0, 30, 63]
    case = Case(score=score, tokens=63, head_dim=5, heads=(4, 2), segments=True, initial_state=False)
    arrays = case.arrays()
    inputs = [arrays[name] for name in ("q", "k", "v", "log_decay")]
    segment_ids = arrays["segment_ids"]
    # Nothing crosses a segment's edge, so a state may cross a cut only inside one: move the edges away.
    for cut in cuts[1:-1]:
        segment_ids[:, cut] = segment_ids[:, cut - 1]
    want, want_final = oracle.forward(*inputs, score=score, normalize=True, segment_ids=segment_ids)
    options = {"score": score, "normalize": True, "segment_ids": segment_ids}
    want_gradients = oracle.gradients(2 * want, None, *inputs, **options)

    with jax.enable_x64(True):
        common = {"score": score, "normalize": True, "return_final_state": True, "implementation": implementation}
        empty = case.empty_state(jnp.float64)

        def parts(q, k, v, log_decay):
            state, pieces = empty, []
            for piece in itertools.starmap(slice, itertools.pairwise(cuts)):
                y, state = decay_attention(
                    q[:, piece],
                    k[:, piece],
                    v[:, piece],
                    log_decay[:, piece],
                    segment_ids=segment_ids[:, piece],
                    initial_state=state,
                    form=form,
                    **common,
                )
                pieces.append(y)
            return jnp.concatenate(pieces, 1), state

        def loss(*inputs):
            y, state = parts(*inputs)
            return (y**2).sum(), (y, state)

        if differentiated := EXHAUSTIVE or score == "exp":
            gradients, (y, state) = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
        else:
            y, state = jax.jit(parts)(*inputs)
    assert relative_error(y, want) < 1e-12
    assert_same_state(state, want_final, 1e-12)
    for name, gradient in zip(("q", "k", "v", "log_decay"), gradients if differentiated else ()):
        assert relative_error(gradient, want_gradients[name]) < 1e-11, name


@pytest.mark.quick
@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_equal_the_whole_sequence(score, normalize):
    case = Case(score=score, normalize=normalize, tokens=9, head_dim=5, heads=(4, 2))
    arrays = case.arrays()
    inputs = [arrays[name] for name in ("q", "k", "v", "log_decay")]
    want, want_final = oracle.forward(*inputs, score=score, normalize=normalize)
    with jax.enable_x64(True):
        step = jax.jit(functools.partial(decay_attention_step, score=score, normalize=normalize))
        state = case.empty_state(jnp.float64)
        for t in range(case.tokens):
            y, state = step(*(x[:, t] for x in inputs), state)
            assert relative_error(y, want[:, t]) < 1e-12
        assert_same_state(state, want_final, 1e-12)


def test_every_pair_of_settings_is_in_a_case():
    settings = {"row": FORMS} | SETTINGS
    chosen = [{"row": row, **dataclasses.asdict(case)} for case, *row in CHOICES]
    for first, second in itertools.combinations(settings, 2):
        seen = {(choice[first] if first != "row" else tuple(choice["row"]), choice[second]) for choice in chosen}
        every = set(itertools.product(settings[first], settings[second]))
        assert seen == every - {(("recurrent", "xla"), "exp")}
