"""The chunked kernels on a Hopper GPU, at full sizes: `pytest -n 0 -m gpu tests/kernels/test_chunked_gpu.py`.

Errors are relative to the largest entry of the float64 oracle's result: a state is a sum of bfloat16 products, so that
an entry errs by what its terms are, not by what it is.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support import oracle
from support.chunked_cases import Case, assert_near, normal
from support.hopper import HOPPER, on_two_devices
from support.ladder import LADDER, ladder_inputs, relative_rms

from twomamba_jax import decay_attention

pytestmark = HOPPER

LONG = Case(4097, heads=(2, 1))
CASES = [
    LONG,
    dataclasses.replace(LONG, edges=(1, 256, 1024, 1025, 3000, 4096)),
    dataclasses.replace(LONG, normalize=False, decay=False),
    Case(500, heads=(4, 2), batch=2, edges=(499,)),
    Case(500, heads=(2, 2), normalize=False),
    Case(63, heads=(2, 2), batch=2, decay=False),
    Case(1),
]
LINEAR = dataclasses.replace(LONG, score="linear")
CASES += [
    LINEAR,
    dataclasses.replace(LINEAR, edges=(1, 128, 512, 513, 3000, 4096)),
    dataclasses.replace(LINEAR, normalize=False, decay=False),
    dataclasses.replace(LINEAR, head_dim=128, edges=(3000,)),
    Case(500, "linear", 128, heads=(4, 2), batch=2, normalize=False, edges=(499,)),
    Case(1500, "linear", heads=(4, 1), batch=2, decay=False),
    Case(63, "linear", heads=(2, 2), batch=2, normalize=False),
    Case(1, "linear"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_states_and_gradients_equal_the_oracle(case):
    got, want = case.results(jax.jit), case.oracle()
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_near(x, want[name], 2**-6, name)
    assert_near(got["key_sum"], want["key_sum"], 1e-5)


@pytest.mark.parametrize("case", [LONG, LINEAR], ids=str)
def test_two_halves_with_the_state_passed_are_the_whole(case):
    """Outputs and gradients, the gradient of the state passed on included."""
    inputs, (dy, dfinal) = case.inputs(), case.cotangents()
    state = inputs.pop("state")

    def whole(inputs, state):
        return case.operation(**inputs, state=state, implementation="mosaic_gpu")

    def halves(inputs, state):
        outputs = []
        for part in (np.s_[:, :2048], np.s_[:, 2048:]):
            piece = {name: x[part] for name, x in inputs.items()}
            y, state = case.operation(**piece, state=state, implementation="mosaic_gpu")
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    def results(function):
        outputs, pull = jax.vjp(function, inputs, state)
        return jax.tree.leaves((outputs, pull((dy, dfinal))))

    for got, want in zip(jax.jit(lambda: results(halves))(), jax.jit(lambda: results(whole))()):
        assert_near(got, want, 2**-7)


@pytest.mark.parametrize(("share", "allowed"), LADDER)
def test_conditioning_ladder(share, allowed):
    """The errors that the XLA form is allowed; rows after the first chunk lean on the state."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in ladder_inputs(share))
    want, _ = oracle.forward(q, k, v, score="squared", normalize=True)
    got = decay_attention(q, k, v, form="chunked", chunk_size=256, implementation="mosaic_gpu")
    assert relative_rms(got[:, 256:], want[:, 256:]) < allowed


@pytest.mark.parametrize("score", ["linear", "squared"])
def test_every_run_has_the_same_bits_whatever_was_in_memory(score):
    case = Case(5000, score, heads=(8, 4), batch=2, edges=(7, 1000, 4000))
    programs = []

    def compiled_once(run):
        """The first call's program, which is every call's."""
        programs.append(jax.jit(run))
        return programs[0]

    first = jax.device_get(case.results(compiled_once))
    assert all(np.isfinite(x.astype(np.float32)).all() for x in first.values())
    for filling in (np.nan, np.inf, -1e30):
        # The allocator hands freed blocks out again.
        garbage = [jnp.full(x.size, filling, x.dtype) for x, _ in itertools.product(first.values(), range(4))]
        jax.block_until_ready(garbage)
        del garbage
        for name, x in jax.device_get(case.results(compiled_once)).items():
            np.testing.assert_array_equal(x, first[name], err_msg=name)


@pytest.mark.parametrize("score", ["linear", "squared"])
def test_a_million_tokens_and_more_than_two_to_the_31_elements(score):
    """The last rows are those of the last tokens alone: the decay has forgotten what was before."""
    tokens, heads, last = 1_000_003, 34, 20_000
    assert tokens * heads * 64 > 2**31
    q, k, v = (normal(seed, 1, tokens, 1, 64) for seed in range(3))
    q, k = (abs(x) if score == "linear" else x for x in (q, k))  # of linear scores it must not be negative
    decay = jnp.full((1, tokens, 1), -0.01, jnp.float32)

    def attend(*inputs):
        return decay_attention(*inputs, score=score, form="chunked", implementation="mosaic_gpu")

    y = jax.jit(lambda q, *rest: attend(jnp.tile(q, (1, 1, heads, 1)), *rest))(q, k, v, decay)
    alone = attend(*(x[:, -last:] for x in (q, k, v, decay)))[:, last // 2 :]
    for head in (0, heads // 2, heads - 1):
        assert_near(y[:, -last // 2 :, head], alone[:, :, 0], 2**-7)
    assert bool(jnp.isfinite(y).all())


@on_two_devices
@pytest.mark.parametrize("score", ["linear", "squared"])
@pytest.mark.parametrize("axis", ["batch", "tokens", "heads"])
def test_sharded_over_two_devices(axis, score):
    case = Case(1500, score, heads=(4, 2), batch=2, edges=(700, 750))
    partition = PartitionSpec(*("data" if axis == name else None for name in ("batch", "tokens", "heads")))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        got, want = case.results(jax.jit, partition=partition), case.oracle()
    assert not got["y"].sharding.is_fully_replicated
    for name, x in got.items():
        assert_near(x, want[name], 2**-6, name)
