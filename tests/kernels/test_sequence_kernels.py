"""The chunked kernels of devices that share a sequence: the states that they pass on, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.chunked_cases import normal, wide
from support.exhaustive import EXHAUSTIVE

from pallas_kernels.chunked import attention
from pallas_kernels.chunked.attention import ChunkedAttention, StateArrays
from pallas_kernels.chunked.decays import chunk_weights
from pallas_kernels.chunked.mosaic_gpu import STAGES
from pallas_kernels.chunked.problem import Problem, Tiles
from pallas_kernels.interpreter import interpreted
from pallas_kernels.quadratic.attention import Attention
from pallas_kernels.quadratic.mosaic_gpu import KERNELS
from twomamba_jax import decay_attention
from twomamba_jax.ops import dispatch, recurrence
from twomamba_jax.ops.score import features

TOKENS, CHUNK = 256, 128
TILES = Tiles(tokens=64, states=8, halves=1, programs=3)


def enter(weights, added, initial, reverse):
    """`SequenceAxis.enter` where the two rows of the batch are devices."""
    first = 1 if reverse else 0
    start = jax.tree.map(lambda x: x[first], initial)
    steps_of_first = jax.tree.map(lambda x: x[:, first], (weights, added))
    passed = recurrence.advance(start, *recurrence.compose_all(*steps_of_first, reverse))
    return jax.tree.map(lambda *x: jnp.stack(x[::-1] if reverse else x), start, passed)


@pytest.mark.parametrize(
    ("score", "reverse"),
    [("linear", False), ("linear", True), ("squared", False), ("squared", True)][: None if EXHAUSTIVE else 2],
)
def test_the_states_of_two_devices_are_those_of_one(score, reverse):
    """Before each chunk and after the last, from a state: of a sequence on one device, and of its halves on two."""
    x, values = normal(0, 1, TOKENS, 1, 64), normal(1, 1, TOKENS, 1, 64)
    factor = normal(2, 1, 1, TOKENS, dtype=jnp.float32)
    keep = jnp.asarray([[[0.5, 0.75]]])
    phi = features(score, normal(3, 1, 1, 70, 64, dtype=jnp.float32))
    initial = StateArrays(jnp.einsum("bgtd,bgtv->bgdv", phi, normal(4, 1, 1, 70, 64, dtype=jnp.float32)), phi.sum(2))

    def states(enter, devices, initial):
        spec = ChunkedAttention(Attention(KERNELS, score, True, 1.0, 0.0), STAGES[score], CHUNK, TILES, enter=enter)
        problem = Problem(devices, TOKENS // devices, 1, 1, CHUNK, TILES, True)
        arrays = [y.reshape(devices, TOKENS // devices, 1, 64) for y in (x, values)]
        weights = [y.reshape(devices, 1, -1) for y in (factor, keep)]
        added = spec.stages.add(problem, *arrays, None, weights[0])
        before, final, _ = attention._states(spec, added, weights[1], initial, reverse=reverse)
        if score == "squared":  # whose normaliser is a sum of two
            before = before._replace(normalizer=wide(before.normalizer).sum(3))
        last = 0 if reverse else devices - 1
        return *(y.reshape(-1, *y.shape[3:]) for y in before), *(y[last] for y in final)

    with interpreted():
        want = states(None, 1, initial)
        got = states(enter, 2, jax.tree.map(lambda x: jnp.concatenate([x, x]), initial))
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-4 * np.abs(b).max())  # rounded to bfloat16


def test_a_segment_that_begins_with_a_device_sees_no_state():
    """Run 0 is that in which the device before ends, also where none of the tokens is in it."""
    weights = chunk_weights(None, jnp.ones((1, CHUNK), jnp.int32), (1, CHUNK, 1), CHUNK)
    assert not weights.through.any()
    assert not weights.keep.any()
    assert weights.reach.all()


@pytest.mark.parametrize(("devices", "rounds"), [(2, 1), (4, 3)])
def test_devices_pass_on_states_and_gather_nothing(monkeypatch, devices, rounds):
    """Forward and backward on a mesh that tracing needs no devices for."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    mesh = AbstractMesh((2, devices), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    array = jax.ShapeDtypeStruct((2, 256 * devices, 1, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256 * devices), jnp.int32)

    def loss(x, ids):
        options = {"segment_ids": ids, "partition": PartitionSpec("data", "sequence"), "implementation": "mosaic_gpu"}
        return decay_attention(x, x, x, form="chunked", **options).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(loss))(array, ids))
    assert "bf16[1,256,1,64]" in text  # a row and its share of the tokens
    # The last id, and (kv, normaliser, weight) in each round: forward, and backward, for which states are kept.
    assert text.count("ppermute") == 1 + 2 * 3 * rounds
    assert "all_gather" not in text
