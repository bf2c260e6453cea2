"""The step of decoding in Triton: interpreted without a GPU, compiled with one, against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE
from support.step_cases import CASES, check, normal
from support.triton import COMPILED  # before triton

from pallas_kernels.decoding.contract import DecodeStep
from pallas_kernels.triton.decoding import step as kernel


@pytest.fixture
def large_tiles(monkeypatch):
    """Eight offsets of the features in a tile, three tiles in a program: few, for the interpreter."""
    if COMPILED:
        return
    large = kernel.StepTiles(height=512, tiles=3, ring=32, num_warps=4, num_stages=2)
    monkeypatch.setattr(kernel, "TILES", dict.fromkeys(kernel.TILES, large))
    monkeypatch.setattr(kernel, "PROGRAMS", 1)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", CASES if EXHAUSTIVE else [CASES[1], CASES[3], CASES[4]], ids=str)
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
    ends = [np.tile(np.array(x, np.int32), (3, 1)) for x in ((4, 8), (7, 9))]
    token = normal(4, 2, 2, 2, 64), normal(5, 2, 2, 64), normal(6, 2, 2, 64)
    decays = -np.abs(normal(7, 2, 2, 64)) * (np.arange(64) < 8)

    @jax.jit
    def step(layer, *arguments):
        return kernel.decode_step(DecodeStep("squared", True, 1 / 8), layer, *arguments)

    got = step(jnp.int32(2), *state, *rings, *ends, *token, decays)
    of_layers, of_token = jax.tree.map(np.asarray, ((*state, *rings), (*token, decays)))
    for b, g in np.ndindex(2, 2):
        row, head = slice(b, b + 1), slice(g, g + 1)
        alone = *(x[2:, row, head] for x in of_layers), *(x[2:, row] for x in ends), *(x[row, head] for x in of_token)
        want = step(jnp.int32(0), *alone)
        np.testing.assert_array_equal(np.asarray(got)[:, b, g], np.asarray(want)[:, 0, 0])
    assert np.abs(got).sum(0).min() > 0


@pytest.mark.usefixtures("large_tiles")
def test_mapped_tokens_are_those_that_each_would_be_alone():
    """Of one state."""
    state = normal(0, 1, 1, 1, 64, 64), normal(1, 1, 1, 1, 64)
    rings = normal(2, 1, 1, 1, 8, 64), normal(3, 1, 1, 1, 8, 64)
    ends = [np.full((1, 1), x, np.int32) for x in (4, 7)]
    tokens = normal(4, 3, 1, 1, 1, 64), normal(5, 3, 1, 1, 64), normal(6, 3, 1, 1, 64)
    decays = np.zeros((1, 1, 64), np.float32)

    @jax.jit
    def step(*token):
        return kernel.decode_step(
            DecodeStep("linear", True, 1 / 8), jnp.int32(0), *state, *rings, *ends, *token, decays
        )

    np.testing.assert_array_equal(jax.vmap(step)(*tokens), jnp.stack([step(*token) for token in zip(*tokens)]))


def test_every_program_has_tiles():
    """However many states share the GPU, the parts of one cover it once."""
    spec = DecodeStep("squared", True, 1 / 8)
    kv = jax.ShapeDtypeStruct((20, 64, 16, 2080, 64), jnp.float32)
    for cut in kernel.TILES.values():
        for batch in (1, 2, 3, 64, 1000):
            sizes = kernel.constexprs(spec, cut, batch, 16, 1, kv, 32)
            count = -(-2080 // cut.height)
            assert 1 <= sizes["TILES"] <= cut.tiles
            covered = (kernel.num_parts(2080, cut, sizes) - 1) * sizes["TILES"]
            assert covered - sizes["TILES"] < count <= covered
