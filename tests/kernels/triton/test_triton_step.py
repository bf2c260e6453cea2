"""The step of decoding in Triton, interpreted, against the definition in float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from support.step_cases import CASES, check, normal

from pallas_kernels.decoding.contract import DecodeStep
from pallas_kernels.triton.decoding import step as kernel


@pytest.fixture
def large_tiles(monkeypatch):
    """Eight offsets of the features in a tile, three tiles in a program: few, for the interpreter."""
    large = kernel.StepTiles(height=512, lanes=16, tiles=3, num_warps=4, num_stages=2)
    monkeypatch.setattr(kernel, "TILES", dict.fromkeys(kernel.TILES, large))
    monkeypatch.setattr(kernel, "PROGRAMS", 1)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    check(kernel.decode_step, *case)


def test_equals_the_definition_in_the_tiles_of_the_table():
    check(kernel.decode_step, "squared", True, 1, jnp.bfloat16, jnp.float32, 4, (3,))


@pytest.mark.usefixtures("large_tiles")
def test_heads_of_a_layer_are_those_that_each_would_be_alone():
    """Two groups in two rows, in the last of three layers: the same bits as from a stack of that head and layer."""
    heads = 3, 2, 2
    state = normal(0, *heads, 2080, 64), normal(1, *heads, 2080)
    rings = normal(2, *heads, 8, 64), normal(3, *heads, 8, 64)
    ends = jnp.tile(jnp.array([4, 8], jnp.int32), (3, 1)), jnp.tile(jnp.array([7, 9], jnp.int32), (3, 1))
    token = normal(4, 2, 2, 2, 64), normal(5, 2, 2, 64), normal(6, 2, 2, 64)
    decays = jnp.zeros((2, 2, 64)).at[:, :, 4:8].set(-jnp.abs(normal(7, 2, 2, 4)))
    step = functools.partial(kernel.decode_step, DecodeStep("squared", True, 1 / 8))
    got = step(jnp.int32(2), *state, *rings, *ends, *token, decays).sum(0)
    for b, g in np.ndindex(2, 2):
        stack = (x[2:, b : b + 1, g : g + 1] for x in (*state, *rings))
        alone = (x[b : b + 1, g : g + 1] for x in (*token, decays))
        want = step(jnp.int32(0), *stack, *(x[2:, b : b + 1] for x in ends), *alone).sum(0)
        np.testing.assert_array_equal(got[b, g], want[0, 0])
    assert np.abs(got).min() > 0


def test_every_program_has_tiles():
    """However many states share the GPU, the parts of one cover it once."""
    spec = DecodeStep("squared", True, 1 / 8)
    for cut in kernel.TILES.values():
        for batch in (1, 2, 3, 64, 1000):
            sizes = kernel.constexprs(spec, cut, batch, 16, 1, 2080, 32)
            count = -(-2080 // cut.height)
            assert 1 <= sizes["TILES"] <= cut.tiles
            assert (kernel.num_parts(2080, cut, sizes) - 2) * sizes["TILES"] < count
