"""The gradient of the tokens that read from, or were added to, a state: dx_i = 2 Mat(S w_i) x_i."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.layout import HEAD_DIM, TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.features import row_of, transposed
from pallas_kernels.triton.chunked.place import place, sizes
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def gradient_kernel(
    x_ptr,
    xt_ptr,
    w_ptr,
    s_ptr,
    added_ptr,
    normalizer_ptr,
    factor_ptr,
    sums_ptr,
    y_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program takes ROWS rows past all pairs of features, (a, b) for every b at a time.

    The left operand of their products, w times the feature a of every row, is formed in registers.
    """
    b, g, c, h, start = place(tl.program_id(0), TOKENS, HEADS, GROUPS, CHUNK, ROWS)
    state = (b * GROUPS + g) * (TOKENS // CHUNK) + c
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    of_head = (b * HEADS + h) * TOKENS + start
    xt_ptr += (b * HEADS + h) * DIM * TOKENS + start
    s_ptr += state * TILES * DIM * DIM
    at = ((b * TOKENS + start) * HEADS + h) * DIM + row[:, None] * (HEADS * DIM) + feature[None, :]

    w = tl.load(w_ptr + at)
    dx = tl.zeros((ROWS, DIM), tl.float32)
    for a in range(0, DIM, 2):
        one, two = tl.load(xt_ptr + a * TOKENS + row), tl.load(xt_ptr + (a + 1) * TOKENS + row)
        s = tl.load(s_ptr + row_of(a, feature)[:, None] * DIM + feature[None, :])
        dx = tl.dot(w * one[:, None], tl.trans(s), dx)
        s = tl.load(s_ptr + row_of(a + 1, feature)[:, None] * DIM + feature[None, :])
        dx = tl.dot(w * two[:, None], tl.trans(s), dx)
    x = tl.load(x_ptr + at).to(tl.float32)
    if normalizer_ptr is not None:
        scaled = (x * tl.load(factor_ptr + of_head + row)[:, None]).to(w.dtype)
        matrix = normalizer_ptr + state * 2 * DIM * DIM + feature[:, None] * DIM + feature[None, :]
        dx = tl.dot(scaled, tl.load(matrix), dx)
        dx = tl.dot(scaled, tl.load(matrix + DIM * DIM), dx)
    if sums_ptr is not None:
        tl.store(sums_ptr + of_head + row, tl.sum(x * dx, 1))
    y = tl.load(added_ptr + at).to(tl.float32) + 2 * dx
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@functools.partial(jax.jit, static_argnames=("problem", "want_sums"))
def gradient(problem: Problem, x, w, state, added, *, normalizer=None, factor=None, want_sums: bool = False):
    """added + 2 M_i x_i, with M_i = Mat(S_c w_i) + factor_i Z_c and S_c the state of the token's chunk.

    Mat(S w) is the symmetric matrix whose entry (a, b) is <S_ab, w>.

    Args:
      problem: sizes; its heads are those of x.
      x, w: [B, T, H, 64] bfloat16.
      state: [B, G, N, 40, 64, 64] bfloat16.
      added: [B, T, H, 64] bfloat16.
      normalizer: Z as a sum of two, [B, G, N, 2, 64, 64] bfloat16.
      factor: [B, H, T] float32.
      want_sums: whether to return the sums below.

    Returns:
      [B, T, H, 64] bfloat16, and if `want_sums` <x_i, M_i x_i> [B, H, T] float32.
    """
    p, tiles = problem, tiles_of("squared_gradient", HEAD_DIM)
    rows = math.gcd(tiles.block, p.chunk)

    @batched
    def run(x, xt, w, state, added, normalizer, factor):
        batch = x.shape[0]
        outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
        absent = (None,)  # sums_ptr
        if want_sums:
            outputs.insert(0, jax.ShapeDtypeStruct((batch, p.heads, p.tokens), jnp.float32))
            absent = ()
        return call(
            gradient_kernel,
            *(x, xt, w, state, added, normalizer, factor, *absent),
            out_type=tuple(outputs),
            grid=(batch * p.heads * (p.tokens // rows),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="squared_gradient",
            ROWS=rows,
            DIM=HEAD_DIM,
            TILES=TILES,
            **sizes(p),
        )[::-1]

    return run(x, transposed(x), w, state, added, normalizer, factor)
