"""The quadratic kernels in Triton against the float64 oracle: interpreted without a GPU, compiled with one.

The bounds are those of `kernel_cases`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support.triton  # noqa: F401 (before triton)
import triton
import triton.language as tl
from support.cases import pairwise
from support.exhaustive import EXHAUSTIVE
from support.kernel_cases import INPUTS, UNDERFLOWING, Case, assert_close, underflowing_call

from pallas_kernels.triton.call import call
from pallas_kernels.triton.quadratic.pieces import piece
from pallas_kernels.triton.quadratic.tiles import Tiles

SETTINGS = {
    "score": ["linear", "squared", "exp"],
    "normalize": [True, False],
    "decay": [True, False],
    "segments": [False, True],
    "heads": [(2, 1), (2, 2)],
}
if EXHAUSTIVE:
    SETTINGS |= {"head_dim": [64, 128], "tokens": [130, 1, 63, 400]}
    CASES = [Case(implementation="triton", **settings) for settings in pairwise(SETTINGS)]
    CASES += [Case(tokens=300, score="exp", segments=True, dtype="float16", implementation="triton")]
else:
    CASES = [
        Case(tokens=300, segments=True, heads=(2, 1), implementation="triton"),
        Case(tokens=300, score="exp", heads=(1, 1), dtype="float16", implementation="triton"),
        Case(tokens=130, score="linear", normalize=False, decay=False, heads=(1, 1), implementation="triton"),
        Case(tokens=1, score="exp", normalize=False, segments=True, head_dim=128, implementation="triton"),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_oracle(case):
    call = case.call()
    got = call.run()
    for name, x in got.items():
        like = call.q if name == "y" else getattr(call, name)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert_close(call, got)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", UNDERFLOWING)
def test_a_decay_that_underflows_gives_no_nan_and_no_infinity(kind):
    """Gradients are 0 here where it is below 2^-96 at the end of its key's tile."""
    call = underflowing_call(kind, "triton")
    got = call.run()
    if kind == UNDERFLOWING[0]:
        assert_close(call, got)
    for x in got.values():
        assert np.isfinite(np.asarray(x, np.float32)).all()


def test_a_mapped_row_ignores_what_is_beside_it_in_memory():
    """Tiles reach beyond a sequence that they do not divide: there is the next one, of nothing but NaN."""
    case = Case(tokens=136, heads=(2, 1), batch=2, implementation="triton").call()
    arrays = {name: getattr(case, name).at[1].set(jnp.nan) for name in ("q", "k", "v", "dy")}
    arrays["log_decay"] = case.log_decay
    mapped = {name: x[:, None] for name, x in arrays.items()}
    got = jax.jit(jax.vmap(lambda x: case.gradients(x["dy"], *(x[name] for name in INPUTS))))(mapped)
    assert_close(case.replace(**{name: x[:1] for name, x in arrays.items()}), {name: x[0] for name, x in got.items()})


@pytest.mark.parametrize(("heads", "tiles", "group"), [(6, 3, 2), (4, 1, 4), (3, 5, 1)])
def test_every_head_has_every_tile_once(heads, tiles, group):
    """In groups of heads, and of a group the first tile of each head first."""
    pieces = jax.ShapeDtypeStruct((heads * tiles, 2), jnp.int32)
    options = {"num_warps": 4, "num_stages": 1, "name": "pieces"}
    (got,) = call(write_piece, out_type=(pieces,), grid=(heads * tiles,), GROUP=group, TILES=tiles, **options)
    want = [(first + head, tile) for first in range(0, heads, group) for tile in range(tiles) for head in range(group)]
    np.testing.assert_array_equal(got, want)


@triton.jit
def write_piece(out_ptr, GROUP: tl.constexpr, TILES: tl.constexpr):
    head, tile = piece(GROUP, TILES)
    out_ptr += 2 * tl.program_id(0)
    tl.store(out_ptr, head.to(tl.int32))
    tl.store(out_ptr + 1, tile)


@pytest.mark.parametrize(("score", "normalize"), [("squared", True), ("exp", False)])
def test_float16_is_refused_where_a_weight_may_leave_its_range(score, normalize):
    call = Case(tokens=9, score=score, normalize=normalize, dtype="float16", implementation="triton").call()
    with pytest.raises(ValueError, match="it takes float16 for score='exp', normalised"):
        call.operation(*call.inputs)


@pytest.mark.parametrize("tiles", [(128, 96, 8, 2), (64, 128, 4, 2), (64, 64, 2, 2), (64, 64, 4, 0)], ids=str)
def test_tiles_that_no_kernel_takes_are_refused(tiles):
    with pytest.raises(ValueError, match="must be"):
        Tiles(*tiles)
