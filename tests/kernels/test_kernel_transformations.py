"""What a kernel call may be put into, and what must not change its results, through the Pallas interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.kernel_cases import INPUTS, Case, assert_close

from pallas_kernels.interpreter import interpreted
from pallas_kernels.quadratic.attention import Attention, attention
from pallas_kernels.quadratic.mosaic_gpu import KERNELS
from pallas_kernels.quadratic.tuning import Tiles, Tuning
from twomamba_jax import decay_attention

SHORT = Case(tokens=40, heads=(1, 1))
ROWS = dataclasses.replace(SHORT, segments=True, lengths=True)  # one program for the tests that take its `run`


@pytest.fixture(autouse=True)
def interpreter():
    with interpreted():
        yield


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def run_tuned(call, tuning):
    """`Call.run` with tiles of one's own."""
    scale = call.q.shape[-1] ** -0.5
    spec = Attention(KERNELS, call.options["score"], call.options["normalize"], scale, floor=2.0**-100, tuning=tuning)

    def gradients(dy, *inputs):
        y, pull = jax.vjp(lambda *inputs: attention(spec, *inputs, None), *inputs)
        return dict(zip(("y", *INPUTS), (y, *pull(dy))))

    return jax.jit(gradients)(call.dy, *call.inputs)


TILES = {
    "128": Tiles(own=128, streamed=128, num_stages=2),
    "192": Tiles(own=192, streamed=64, num_stages=3, consumer_registers=152, producer_registers=40),
    "narrow": Tiles(own=128, streamed=64, num_stages=2, resident=False, part=32),
}


@pytest.mark.parametrize(
    ("score", "name"),
    [("exp", "narrow"), ("squared", "192"), ("squared", "narrow"), ("exp", "128")][: None if EXHAUSTIVE else 1],
)
def test_tiles_of_other_sizes(score, name):
    tiles = TILES[name]
    whole = dataclasses.replace(tiles, part=None)
    call = Case(score=score, tokens=200, heads=(1, 1)).call()
    # One program goes from one tile to the next; calls with the table's tuning have programs without a tile.
    assert_close(call, run_tuned(call, Tuning(whole, whole, tiles, programs=1)))


@exhaustive("test_tiles_of_other_sizes, in which one program goes from tile to tile")
def test_the_number_of_programs_changes_nothing():
    """With fewer programs than the four tiles, each goes from one tile to the next; with more, some have none."""
    tiles = Tiles(own=64, streamed=64, num_stages=2)
    call = Case(tokens=200, heads=(1, 1)).call()
    three, many = (run_tuned(call, Tuning(tiles, tiles, tiles, programs=n)) for n in (3, 8))
    assert_close(call, three)
    assert_same_bits(many, three)


@exhaustive("test_conformance.py, with XLA's states, and test_linear_kernels.py, with those of kernels")
def test_the_final_state_is_that_of_xla():
    call = ROWS.call()
    y, state = jax.jit(functools.partial(call.operation, return_final_state=True))(*call.inputs)
    common = {"form": "parallel", "implementation": "xla", "return_final_state": True}
    want = jax.jit(lambda *inputs: decay_attention(*inputs, **common, **call.options)[1])(*call.inputs)
    assert_same_bits(state, want)
    assert_same_bits(y, call.run()["y"])  # as it is with gradients


@exhaustive("test_kernel_lowering.py's, of what is traced, and the mapped axes of triton/")
def test_vmap():
    """Over an axis of each input, of the call and of its gradients."""
    call = SHORT.call()
    calls = [call, call.replace(q=call.k, k=call.v, v=call.q, dy=-call.dy, log_decay=3 * call.log_decay)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *((call.dy, *call.inputs) for call in calls))
    got = jax.jit(jax.vmap(call.gradients, in_axes=1))(*stacked)
    for i, call in enumerate(calls):
        assert_close(call, {name: x[i] for name, x in got.items()})


@exhaustive("test_kernel_lowering.py's scan over layers")
def test_scan_over_layers():
    call = SHORT.call()
    decays = jnp.stack([call.log_decay, 2 * call.log_decay])

    def layer(x, decay):
        return call.operation(x, x, x, decay)

    @jax.jit
    def results(decays):
        y, pull = jax.vjp(lambda x, decays: jax.lax.scan(lambda *a: (layer(*a), None), x, decays)[0], call.q, decays)
        return y, pull(call.dy)

    @jax.jit
    def one(x, decay, dy):
        y, pull = jax.vjp(layer, x, decay)
        return y, pull(dy)

    between, _ = one(call.q, decays[0], call.dy)
    y, (dbetween, dlast) = one(between, decays[1], call.dy)
    _, (dq, dfirst) = one(call.q, decays[0], dbetween)
    assert_same_bits(results(decays), (y, (dq, jnp.stack([dfirst, dlast]))))


def test_traces_in_float64_mode_with_float64_decays():
    """The kernels count in 32 bits there too. The interpreter itself does not run in that mode."""
    call = SHORT.call()
    with jax.enable_x64(True):
        wide = call.replace(log_decay=jnp.asarray(np.asarray(call.log_decay), jnp.float64))
        got = jax.eval_shape(wide.run)
    assert (got["y"].dtype, got["q"].dtype, got["log_decay"].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float64)


@exhaustive("those of test_quadratic_gpu.py, on a GPU: the interpreter takes turns")
def test_two_runs_have_the_same_bits():
    call = ROWS.call()
    assert_same_bits(call.run(), call.run())


@exhaustive("test_kernel_lowering.py's part of each device, and the meshes of test_fold.py and test_decode_step.py")
def test_a_partition_on_a_mesh_of_one_changes_nothing():
    call = ROWS.call()
    want = call.run()
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = call.replace(partition=PartitionSpec("data", None, "tensor")).run()
    assert_same_bits(got, want)
