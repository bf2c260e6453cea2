"""The Triton kernels on a GPU, at full sizes: `pytest -n 0 -m gpu tests/kernels/triton`.

Once as code for this GPU, and once as code for compute capability 8.0 that this GPU runs: other instructions, other
copies, and other tiles where the table says so.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.cases import pairwise
from support.chunked_cases import Case as Chunked
from support.chunked_cases import assert_near
from support.kernel_cases import Case, assert_close
from support.triton import COMPILED, as_on

from twomamba_jax import decay_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not COMPILED, reason="needs a CUDA device of compute capability 8.0 or later"),
]

SETTINGS = {
    "score": ["linear", "squared", "exp"],
    "normalize": [True, False],
    "decay": [True, False],
    "segments": [False, True],
    "lengths": [False, True],
    "heads": [(4, 2), (4, 4)],
    "head_dim": [64, 128],
    "tokens": [500, 63, 1],
}
QUADRATIC = [Case(batch=2, implementation="triton", **settings) for settings in pairwise(SETTINGS)]
LONG = Case(tokens=4097, heads=(2, 1), implementation="triton")
QUADRATIC += [
    dataclasses.replace(LONG, score="squared", segments=True),
    dataclasses.replace(LONG, score="exp", head_dim=128),
    dataclasses.replace(LONG, score="linear", normalize=False),
    dataclasses.replace(LONG, score="exp", segments=True, dtype="float16"),
]

SQUARED = Chunked(4097, heads=(2, 1))
LINEAR = dataclasses.replace(SQUARED, score="linear")
CHUNKED = [
    SQUARED,
    dataclasses.replace(SQUARED, edges=(1, 256, 1024, 1025, 3000, 4096)),
    dataclasses.replace(SQUARED, normalize=False, decay=False),
    Chunked(500, heads=(4, 2), batch=2, edges=(499,)),
    Chunked(63, heads=(2, 2), batch=2, decay=False),
    Chunked(1),
    LINEAR,
    dataclasses.replace(LINEAR, head_dim=128, edges=(1, 128, 512, 513, 3000)),
    Chunked(500, "linear", heads=(4, 2), batch=2, normalize=False, edges=(499,)),
    Chunked(1, "linear"),
]


@pytest.fixture(params=[None, 80], ids=["own", "as-sm_80"], scope="module")
def code(request):
    """Which code the kernels are compiled to."""
    with contextlib.nullcontext() if request.param is None else as_on(request.param):
        yield request.param


@pytest.mark.parametrize("case", QUADRATIC, ids=str)
def test_outputs_and_gradients_equal_the_oracle(code, case):
    call = case.call()
    assert_close(call, call.run())


def test_rows_of_exp_with_enormous_scores_are_values(code):
    """Without a decay, where a product and a difference may become one instruction; scores are up to 2^60."""
    call = Case("exp", decay=False, segments=True, tokens=300, implementation="triton").call()
    call = call.replace(q=call.q * jnp.bfloat16(2.0**57))
    y, v = (np.asarray(x, np.float32) for x in (call.run()["y"], call.v))
    v = np.repeat(v, y.shape[2] // v.shape[2], axis=2)
    assert (abs(y[:, :, None] - v[:, None]).max(-1).min(2) == 0).all()


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_outputs_states_and_gradients_equal_the_oracle(code, case):
    got, want = case.results(jax.jit, "triton"), case.oracle()
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_near(x, want[name], 2**-6, name)
    assert_near(got["key_sum"], want["key_sum"], 1e-5)


@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
def test_bits_are_the_same_whatever_the_memory_held(code, score):
    call = Case(score=score, tokens=2000, batch=2, heads=(8, 4), segments=True, implementation="triton").call()
    _same_bits_twice(call.run)


@pytest.mark.parametrize("case", [SQUARED, LINEAR], ids=str)
def test_bits_of_the_chunked_form_are_the_same_whatever_the_memory_held(code, case):
    case = dataclasses.replace(case, batch=4, heads=(16, 16), edges=(1, 1000, 3000))
    inputs, cotangents, ids = case.inputs(), case.cotangents(), case.segment_ids

    @jax.jit
    def run(inputs, cotangents):
        def operation(inputs):
            return case.operation(**inputs, segment_ids=ids, implementation="triton")

        results, pull = jax.vjp(operation, inputs)
        return {"results": results, "gradients": pull(cotangents)}

    _same_bits_twice(lambda: run(inputs, cotangents))


def _same_bits_twice(run):
    first = run()
    poison = jnp.full((2**28,), jnp.nan, jnp.float32)  # memory that the next outputs may be given
    jax.block_until_ready(poison)
    del poison
    jax.tree.map(np.testing.assert_array_equal, run(), first)


@pytest.mark.parametrize("score", ["linear", "squared"])
@pytest.mark.parametrize("log_decay", [-1e-7, -128.0, -1e30])
def test_decays_from_none_to_all(code, score, log_decay):
    case = Chunked(2500, score, heads=(2, 1))
    inputs = case.inputs()
    inputs["log_decay"] = jnp.full_like(inputs["log_decay"], log_decay)

    def y(implementation):
        return jax.jit(lambda inputs: case.operation(**inputs, implementation=implementation)[0])(inputs)

    assert_near(y("triton"), np.asarray(y("xla"), np.float64), 2**-6)


def test_inside_of_transformations(code):
    """vmap, a scan of rematerialised layers, shard_map: the same as alone."""
    call = Case(tokens=300, batch=2, heads=(2, 1), segments=True, implementation="triton").call()
    q, k, v, log_decay = call.inputs
    ids = call.options["segment_ids"]

    def attend(q, k, v, log_decay, ids):
        return decay_attention(q, k, v, log_decay, segment_ids=ids, form="parallel", implementation="triton")

    def loss(q, *rest):
        return attend(q, *rest).astype(jnp.float32).sum()

    want = jax.jit(jax.value_and_grad(loss))(q, k, v, log_decay, ids)
    rows = tuple(x[:, None] for x in (q, k, v, log_decay, ids))
    mapped = jax.jit(jax.value_and_grad(lambda q, *rest: jax.vmap(attend)(q, *rest).astype(jnp.float32).sum()))(*rows)
    np.testing.assert_array_equal(mapped[1][:, 0], want[1])

    def layers(q, *rest):
        step = jax.checkpoint(lambda x, _: (attend(x, *rest), None))
        return jax.lax.scan(step, q, None, 2)[0].astype(jnp.float32).sum()

    def twice(q, *rest):
        return loss(attend(q, *rest), *rest)

    got, twice = (jax.jit(jax.grad(f))(q, k, v, log_decay, ids) for f in (layers, twice))
    np.testing.assert_array_equal(got, twice)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        sharded = jax.shard_map(attend, in_specs=(spec,) * 5, out_specs=spec)
        np.testing.assert_array_equal(
            jax.jit(sharded)(q, k, v, log_decay, ids), jax.jit(attend)(q, k, v, log_decay, ids)
        )
