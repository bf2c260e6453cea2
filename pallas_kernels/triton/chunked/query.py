"""What the tokens of each chunk read from the state before it: N_i = S^T phi(x_i)."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.layout import HEAD_DIM, STARTS
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.features import left, multiplicity, right, words
from pallas_kernels.triton.chunked.place import place, sizes
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def _add_kind(
    sums,
    x_ptr,
    words_ptr,
    s_ptr,
    KIND: tl.constexpr,
    START: tl.constexpr,
    END: tl.constexpr,
    SQUARED_POWER: tl.constexpr,
    TOKENS: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Adds what the rows read from the tiles of one kind, START to END."""
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    x = tl.load(x_ptr + row[:, None] * STRIDE + right(KIND, feature)[None, :])
    x = x * (multiplicity(KIND, feature) * SQUARED_POWER)[None, :].to(x.dtype)
    tile_at = feature[:, None] * DIM + feature[None, :]
    for tile in range(START, END, 2):
        one, two = left(words_ptr + row, TOKENS, KIND, tile, feature[None, :], 1)
        sums = tl.dot(x * one, tl.load(s_ptr + tile * DIM * DIM + tile_at), sums)
        sums = tl.dot(x * two, tl.load(s_ptr + (tile + 1) * DIM * DIM + tile_at), sums)
    return sums


@triton.jit
def query_kernel(
    x_ptr,
    words_ptr,
    s_ptr,
    weight_ptr,
    added_ptr,
    normalizer_ptr,
    own_norm_ptr,
    norm_ptr,
    y_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    STARTS: tl.constexpr,
    SQUARED_POWER: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """A program takes ROWS rows past all tiles of the state.

    The left operand of their products, x times one feature of every row, is formed in registers.
    """
    b, g, c, h, start = place(tl.program_id(0), TOKENS, HEADS, GROUPS, CHUNK, ROWS)
    state = (b * GROUPS + g) * (TOKENS // CHUNK) + c
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    own = ((b * TOKENS + start) * HEADS + h) * DIM
    of_head = (b * HEADS + h) * TOKENS + start
    x_ptr += own
    words_ptr += (b * HEADS + h) * (DIM // 2) * TOKENS + start
    s_ptr += state * STARTS[3] * DIM * DIM
    at = own + row[:, None] * (HEADS * DIM) + feature[None, :]

    if normalizer_ptr is not None:
        x = tl.load(x_ptr + row[:, None] * (HEADS * DIM) + feature[None, :])
        matrix = normalizer_ptr + state * 2 * DIM * DIM + feature[:, None] * DIM + feature[None, :]
        zx = tl.dot(x, tl.load(matrix))
        zx = tl.dot(x, tl.load(matrix + DIM * DIM), zx)
        through = tl.maximum(tl.sum(zx * x.to(tl.float32), 1) * SQUARED_POWER, 0.0)

    sums = tl.zeros((ROWS, DIM), tl.float32)
    for kind in tl.static_range(3):
        sums = _add_kind(
            *(sums, x_ptr, words_ptr, s_ptr, kind, STARTS[kind], STARTS[kind + 1], SQUARED_POWER),
            *(TOKENS, HEADS * DIM, ROWS, DIM),
        )
    y = tl.load(added_ptr + at).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + (b * GROUPS + g) * TOKENS + start + row)
        sums *= weight[:, None]
    if normalizer_ptr is None:
        y += sums
    else:
        if weight_ptr is not None:
            through *= weight
        norm = tl.load(own_norm_ptr + of_head + row)
        inside = tl.exp2(tl.where(norm == float("inf"), -float("inf"), norm))
        total = inside + through
        dead = total < FLOOR
        y = (y * inside[:, None] + sums) * tl.where(dead, 0.0, 1.0 / total)[:, None]
        tl.store(norm_ptr + of_head + row, tl.where(dead, float("inf"), tl.log2(total)))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@functools.partial(jax.jit, static_argnames=("problem", "power", "floor"))
def query(problem: Problem, x, state, weight, added, *, power: float = 1.0, normalizer=None, own_norm=None, floor=0.0):
    """added + weight N, with N_i = S_c^T phi(power x_i) and S_c the state of the token's chunk and group.

    With a normaliser, weights are divided by their sum: added is a quotient whose denominator n has log2 n = own_norm,
    and the result is (n added + weight N) / (n + weight n'), n'_i = power^2 x_i^T Z_c x_i, which is not negative; where
    the denominator is below `floor`, 0.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, 64] bfloat16.
      state: [B, G, N, 40, 64, 64] bfloat16.
      weight: [B, G, T] float32; None is 1.
      added: [B, T, H, 64] bfloat16.
      power: a power of two.
      normalizer: Z as a sum of two, [B, G, N, 2, 64, 64] bfloat16.
      own_norm: [B, H, T] float32.
      floor: for denominators.

    Returns:
      [B, T, H, 64] bfloat16, and with a normaliser log2 of the denominators [B, H, T] float32, +inf below `floor`.
    """
    p, tiles = problem, tiles_of("squared_query", HEAD_DIM)
    rows = math.gcd(tiles.block, p.chunk)

    @batched
    def run(x, words_of_x, state, weight, added, normalizer, own_norm):
        batch = x.shape[0]
        outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
        absent = (None,)  # norm_ptr
        if normalizer is not None:
            outputs.insert(0, jax.ShapeDtypeStruct(own_norm.shape, jnp.float32))
            absent = ()
        return call(
            query_kernel,
            *(x, words_of_x, state, weight, added, normalizer, own_norm, *absent),
            out_type=tuple(outputs),
            grid=(batch * p.heads * (p.tokens // rows),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="squared_query",
            ROWS=rows,
            DIM=HEAD_DIM,
            STARTS=STARTS,
            SQUARED_POWER=power**2,
            FLOOR=floor,
            **sizes(p),
        )[::-1]

    result = run(x, words(x), state, weight, added, normalizer, own_norm)
    return result if normalizer is not None else result[0]
