"""What each chunk adds to the state: S = sum_t phi(x_t) w_t^T, as tiles of `chunked.layout`."""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.layout import HEAD_DIM, STARTS, TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.features import left, right, transposed
from pallas_kernels.triton.chunked.place import sizes
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def _sum_tiles(
    xt_ptr,
    row_ptr,
    w_ptr,
    s_ptr,
    tile,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    REPEATS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    DIM: tl.constexpr,
):
    """Sums the HELD tiles from `tile` on, all of one kind."""
    row, token = tl.arange(0, DIM), tl.arange(0, BLOCK)
    x_at = right(KIND, row)[:, None] * TOKENS + token[None, :]
    loaded_row = tl.load(row_ptr + row)[:, None]
    w_at = token[:, None] * STRIDE + row[None, :]
    sums = (tl.zeros((DIM, DIM), tl.float32),) * HELD
    for _ in range(0, REPEATS):
        for start in range(0, CHUNK, BLOCK):
            x = tl.load(xt_ptr + start + x_at)
            w = tl.load(w_ptr + start * STRIDE + w_at)
            added = ()
            for j in tl.static_range(HELD):
                a = left(xt_ptr + start + token, TOKENS, KIND, tile + j, loaded_row)
                added = added + (tl.dot(x * a, w, sums[j]),)  # noqa: RUF005 (Triton has no stars in tuples)
            sums = added
        w_ptr += DIM
        xt_ptr += DIM * TOKENS
    for j in tl.static_range(HELD):
        tl.store(s_ptr + ((tile + j) * DIM + row[:, None]) * DIM + row[None, :], sums[j])


@triton.jit
def update_kernel(
    xt_ptr,
    row_ptr,
    w_ptr,
    s_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
):
    """A program sums HELD tiles of the state of one chunk and group.

    The left operand of their products is x^T, its features in the order of the tile's rows, times the feature a of
    every token; it is formed in registers.
    """
    repeats: tl.constexpr = HEADS // GROUPS
    chunks: tl.constexpr = TOKENS // CHUNK
    program = tl.program_id(0)
    tile, at = program % (STARTS[3] // HELD) * HELD, (program // (STARTS[3] // HELD)).to(tl.int64)
    c, of_group = at % chunks, at // chunks
    g, b = of_group % GROUPS, of_group // GROUPS
    xt_ptr += (b * HEADS + g * repeats) * DIM * TOKENS + c * CHUNK
    w_ptr += ((b * TOKENS + c * CHUNK) * HEADS + g * repeats) * DIM
    s_ptr += at * STARTS[3] * DIM * DIM
    for kind in tl.static_range(3):
        if (tile >= STARTS[kind]) & (tile < STARTS[kind + 1]):
            _sum_tiles(
                *(xt_ptr, row_ptr, w_ptr, s_ptr, tile, kind),
                *(TOKENS, CHUNK, repeats, HEADS * DIM, BLOCK, HELD, DIM),
            )


@functools.partial(jax.jit, static_argnames="problem")
def update(problem: Problem, x, w):
    """[B, G, N, 40, 64, 64] float32, summed over the tokens of each of N chunks and the heads of each of G groups.

    Args:
      problem: sizes; its heads are those of x and w.
      x, w: [B, T, H, 64] bfloat16.
    """
    p, tiles = problem, tiles_of("squared_update", HEAD_DIM)

    @batched
    def run(xt, w):
        shape = (xt.shape[0], p.groups, p.chunks, TILES, HEAD_DIM, HEAD_DIM)
        return call(
            update_kernel,
            xt,
            jnp.arange(HEAD_DIM, dtype=jnp.int32),
            w,
            out_type=(jax.ShapeDtypeStruct(shape, jnp.float32),),
            grid=(xt.shape[0] * p.groups * p.chunks * (TILES // tiles.held),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="squared_update",
            BLOCK=tiles.block,
            HELD=tiles.held,
            DIM=HEAD_DIM,
            STARTS=STARTS,
            **sizes(p),
        )[0]

    return run(transposed(x), w)
