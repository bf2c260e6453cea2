"""The quadratic kernels on a Hopper GPU, at full sizes: `pytest -n 0 -m gpu tests/kernels/test_quadratic_gpu.py`.

What `test_quadratic_kernels` demands through the interpreter, and what only a device can show: products that really
run asynchronously, memory with anything in it, several devices.
"""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.cases import pairwise
from support.hopper import HOPPER, on_two_devices
from support.kernel_cases import INPUTS, Case, assert_close

from twomamba_jax import decay_attention
from twomamba_jax.ops import dispatch

pytestmark = HOPPER

SCORES = ["linear", "squared", "exp"]
SETTINGS = {
    "score": SCORES,
    "normalize": [True, False],
    "decay": [True, False],
    "segments": [False, True],
    "lengths": [False, True],
    "heads": [(4, 2), (4, 4)],
    "head_dim": [64, 128],
    "tokens": [500, 63, 1],
}
CASES = [Case(batch=2, **settings) for settings in pairwise(SETTINGS)]
LONG = Case(tokens=4097, heads=(2, 1))
CASES += [
    dataclasses.replace(LONG, score="squared", segments=True),
    dataclasses.replace(LONG, score="exp", head_dim=128),
    dataclasses.replace(LONG, score="linear", normalize=False),
]
FULL = Case(tokens=2000, batch=2, heads=(8, 4))  # more tiles than multiprocessors


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_oracle(case):
    call = case.call()
    assert_close(call, call.run())


@pytest.mark.parametrize("score", SCORES)
def test_packed_documents_are_as_if_alone(score):
    """With edges at, just before and just after those of tiles; other documents change no bit and get no gradient."""
    case = Case(score=score, tokens=700, head_dim=128 if score == "squared" else 64)
    edges = [0, 1, 63, 65, 128, 255, 257, 600, 700]
    ids = np.searchsorted(edges, np.arange(case.tokens), side="right")
    call = case.call().replace(segment_ids=jnp.asarray(ids[None]))
    got = call.run()
    for start, end in itertools.pairwise(edges):
        place = np.s_[:, start:end]
        alone = case.call().replace(**{name: getattr(call, name)[place] for name in (*INPUTS, "dy")})
        assert_close(alone, {name: x[place] for name, x in got.items()})

    here = np.s_[:, 257:600]
    only = jnp.zeros(case.tokens, bool).at[257:600].set(True)[:, None, None]
    large = {name: jnp.where(only, getattr(call, name), 50 * getattr(call, name)) for name in ("q", "k", "v")}
    other = call.replace(dy=jnp.where(only, call.dy, 0), **large).run()
    for name, x in other.items():
        np.testing.assert_array_equal(x[here], got[name][here], err_msg=name)
        if name != "y":
            assert (np.asarray(jnp.delete(x, np.arange(257, 600), axis=1)) == 0).all(), name


@pytest.mark.parametrize(("score", "normalize"), [("linear", False), ("squared", True), ("exp", True), ("exp", False)])
def test_extreme_decays(score, normalize):
    """A head without, one with nothing but -128, one of a mixture with decays beyond."""
    call = Case(score=score, normalize=normalize, tokens=500, heads=(3, 3)).call()
    mixture = np.random.default_rng(0).choice([0, -1e-6, -0.3, -5, -128, -1e6], size=500)
    decay = jnp.asarray(np.stack([np.zeros(500), np.full(500, -128), mixture], axis=1)[None], jnp.float32)
    call = call.replace(log_decay=decay)
    got = call.run()
    assert_close(call, got)
    assert (np.asarray(got["log_decay"])[np.asarray(decay) < -128] == 0).all()
    if normalize:
        np.testing.assert_array_equal(got["y"][:, :, 1], call.v[:, :, 1])


@pytest.mark.parametrize("score", SCORES)
def test_zero_queries_and_the_range_of_scores(score):
    call = Case(score=score, tokens=300).call()
    rows = np.array([0, 63, 64, 299])
    call = call.replace(q=call.q.at[0, rows].set(0))
    got = call.run()
    assert_close(call, got)
    if score != "exp":
        assert all((got[name][0, rows] == 0).all() for name in ("y", "q"))
    positive = call.replace(q=abs(call.q), k=abs(call.k))
    scores = 64**-0.5 * np.einsum("bihd,bjhd->bihj", *(np.asarray(x, np.float64) for x in (positive.q, positive.k)))
    for power in (-40 - np.floor(np.log2(scores[scores > 0].min())), 59 - np.floor(np.log2(scores.max()))):
        scaled = positive.replace(q=positive.q * jnp.bfloat16(2.0**power))
        got = scaled.run()
        assert all(np.isfinite(np.asarray(x).astype(np.float32)).all() for x in got.values())
        if score != "exp" or power < 0:
            assert_close(scaled, got)


@pytest.mark.parametrize("segments", [False, True])
def test_rows_of_exp_with_enormous_scores_are_values(segments):
    """Without a decay, where a product and a difference may become one instruction; scores are up to 2^60."""
    call = Case("exp", decay=False, segments=segments, tokens=300).call()
    call = call.replace(q=call.q * jnp.bfloat16(2.0**57))
    y, v = (np.asarray(x, np.float32) for x in (call.run()["y"], call.v))
    v = np.repeat(v, y.shape[2] // v.shape[2], axis=2)
    assert (abs(y[:, :, None] - v[:, None]).max(-1).min(2) == 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_run_has_the_same_bits_whatever_was_in_memory(score, head_dim):
    call = dataclasses.replace(FULL, score=score, head_dim=head_dim, segments=True).call()
    program = jax.jit(call.gradients).lower(call.dy, *call.inputs).compile()
    memory = program.memory_analysis()
    first = jax.device_get(program(call.dy, *call.inputs))
    assert all(np.isfinite(x.astype(np.float32)).all() for x in first.values())
    for filling in (np.nan, np.inf, -1e30):
        # The allocator hands freed blocks out again: those of the results, and that of the temporaries.
        sizes = [x.nbytes for x in first.values()] + [memory.temp_size_in_bytes]
        garbage = [jnp.full(size // 4 + 1, filling, jnp.float32) for size in 2 * sizes]
        jax.block_until_ready(garbage)
        del garbage
        assert_same_bits(jax.device_get(program(call.dy, *call.inputs)), first)


def test_a_call_without_gradients_has_the_bits_of_one_with():
    call = dataclasses.replace(FULL, decay=False).call()
    np.testing.assert_array_equal(jax.jit(call.operation)(*call.inputs), call.run()["y"])


def test_none_takes_the_kernels(caplog):
    dispatch._log_choice.cache_clear()
    call = Case(tokens=4097).call()
    with caplog.at_level(logging.INFO, logger="twomamba_jax"):
        chosen = decay_attention(*call.inputs)
    # Beside it some JAX warns of the kernels' speed.
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == [
        "decay_attention: form=parallel, implementation=mosaic_gpu"
    ]
    np.testing.assert_array_equal(chosen, call.operation(*call.inputs))


def test_rematerialised_layers_in_a_scan():
    """As a model runs them; without rematerialisation no result differs by a rounding to bfloat16."""
    call = Case(tokens=300, batch=2, heads=(2, 2)).call()
    decays = jnp.stack([call.log_decay, 2 * call.log_decay, 0 * call.log_decay])

    def results(wrap):
        layer = wrap(lambda x, decay: (call.operation(x, x, x, decay), None))
        y, pull = jax.vjp(lambda x, decays: jax.lax.scan(layer, x, decays)[0], call.q, decays)
        return dict(zip(("y", "q", "log_decay"), (y, *pull(call.dy))))

    got, want = jax.jit(lambda: results(jax.checkpoint))(), jax.jit(lambda: results(lambda layer: layer))()
    for name, x in want.items():
        x, error = (np.asarray(a).astype(np.float64) for a in (x, got[name] - x))
        assert np.sqrt((error**2).mean()) <= call.unit * np.sqrt((x**2).mean()), name


@on_two_devices
@pytest.mark.parametrize("partition", [PartitionSpec("data"), PartitionSpec(None, None, "data")])
def test_sharded_over_two_devices(partition):
    call = Case(tokens=300, batch=2, heads=(4, 2), segments=True).call()
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(getattr(call, name), NamedSharding(mesh, partition)) for name in (*INPUTS, "dy")}
        got = call.replace(partition=partition, **placed).run()
    assert len({shard.data.nbytes for shard in got["y"].addressable_shards} - {got["y"].nbytes}) == 1
    assert_close(call, got)
