"""What the tokens of each chunk read from the state before it: N_i = S^T phi(x_i)."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.layout import HEAD_DIM, TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.features import transposed
from pallas_kernels.triton.chunked.place import place, sizes
from pallas_kernels.triton.chunked.quotient import quotient
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def _features(x_ptr, FIRST: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """SIZE features of the rows, from FIRST on."""
    return tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * STRIDE + FIRST + tl.arange(0, SIZE)[None, :])


@triton.jit
def _add(sums, x, a, s_ptr, START: tl.constexpr):
    """Adds what the rows read from the rows of a tile from START on: their features x times another one, a."""
    DIM: tl.constexpr = sums.shape[1]
    row, e = START + tl.arange(0, x.shape[1]), tl.arange(0, DIM)
    return tl.dot(x * a[:, None], tl.load(s_ptr + row[:, None] * DIM + e[None, :]), sums)


@triton.jit
def _awaited(sums, tile, AWAIT: tl.constexpr):
    """The sums, all of whose products are done if AWAIT: Triton waits where they are used, here to no other end.

    It would wait in the next turn of the loop else, while the left operands of that are formed where those of this turn
    are still being read.
    """
    if AWAIT:
        sums = tl.where(tile < 40, sums, 0.0)
    return sums


@triton.jit
def _read_state(
    x_ptr,
    xt_ptr,
    s_ptr,
    TOKENS: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    AWAIT: tl.constexpr,
):
    """S^T phi(x) of the rows.

    By kinds of `layout.KINDS`; rows of a tile that stand for two entries of a full matrix apart from those for one.
    """
    TILE: tl.constexpr = DIM * DIM
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    x = _features(x_ptr, 0, 16, STRIDE, ROWS)
    y = _features(x_ptr, 16, 16, STRIDE, ROWS) * 2
    z = _features(x_ptr, 32, 32, STRIDE, ROWS) * 2
    for tile in range(0, 16):
        a = tl.load(xt_ptr + tile * TOKENS + row)
        sums = _add(sums, x, a, s_ptr + tile * TILE, 0)
        sums = _add(sums, y, a, s_ptr + tile * TILE, 16)
        sums = _add(sums, z, a, s_ptr + tile * TILE, 32)
        sums = _awaited(sums, tile, AWAIT)
    x = _features(x_ptr, 48, 16, STRIDE, ROWS)
    y = _features(x_ptr, 16, 16, STRIDE, ROWS)
    for tile in range(16, 32):
        a, b = tl.load(xt_ptr + (tile + 32) * TOKENS + row), tl.load(xt_ptr + tile * TOKENS + row)
        sums = _add(sums, x, a, s_ptr + tile * TILE, 0)
        sums = _add(sums, y, b, s_ptr + tile * TILE, 16)
        sums = _add(sums, z, b, s_ptr + tile * TILE, 32)
        sums = _awaited(sums, tile, AWAIT)
    y = _features(x_ptr, 32, 16, STRIDE, ROWS)
    z = x * 2
    for tile in range(32, 40):
        a, b = (tl.load(xt_ptr + (2 * tile - 32) * TOKENS + row), tl.load(xt_ptr + (2 * tile - 31) * TOKENS + row))
        sums = _add(sums, y, a, s_ptr + tile * TILE, 0)
        sums = _add(sums, z, a, s_ptr + tile * TILE, 16)
        sums = _add(sums, y, b, s_ptr + tile * TILE, 32)
        sums = _add(sums, z, b, s_ptr + tile * TILE, 48)
        sums = _awaited(sums, tile, AWAIT)
    return sums


@triton.jit
def query_kernel(
    x_ptr,
    xt_ptr,
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
    TILES: tl.constexpr,
    SQUARED_POWER: tl.constexpr,
    FLOOR: tl.constexpr,
    AWAIT: tl.constexpr,
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
    xt_ptr += (b * HEADS + h) * DIM * TOKENS + start
    s_ptr += state * TILES * DIM * DIM
    at = own + row[:, None] * (HEADS * DIM) + feature[None, :]

    if normalizer_ptr is not None:
        x = tl.load(x_ptr + row[:, None] * (HEADS * DIM) + feature[None, :])
        matrix = normalizer_ptr + state * 2 * DIM * DIM + feature[:, None] * DIM + feature[None, :]
        zx = tl.zeros((ROWS, DIM), tl.float32)
        for part in range(0, 2):
            zx = tl.dot(x, tl.load(matrix + part * DIM * DIM), zx)
        through = tl.maximum(tl.sum(zx * x.to(tl.float32), 1) * SQUARED_POWER, 0.0)

    sums = _read_state(x_ptr, xt_ptr, s_ptr, TOKENS, HEADS * DIM, ROWS, DIM, AWAIT) * SQUARED_POWER
    y = tl.load(added_ptr + at).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + (b * GROUPS + g) * TOKENS + start + row)
        sums *= weight[:, None]
    if normalizer_ptr is None:
        y += sums
    else:
        if weight_ptr is not None:
            through *= weight
        y, norm = quotient(y, tl.load(own_norm_ptr + of_head + row), sums, through, FLOOR)
        tl.store(norm_ptr + of_head + row, norm)
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
    def run(x, xt, state, weight, added, normalizer, own_norm):
        batch = x.shape[0]
        outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
        absent = (None,)  # norm_ptr
        if normalizer is not None:
            outputs.insert(0, jax.ShapeDtypeStruct(own_norm.shape, jnp.float32))
            absent = ()
        return call(
            query_kernel,
            *(x, xt, state, weight, added, normalizer, own_norm, *absent),
            out_type=tuple(outputs),
            grid=(batch * p.heads * (p.tokens // rows),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="squared_query",
            ROWS=rows,
            DIM=HEAD_DIM,
            TILES=TILES,
            SQUARED_POWER=power**2,
            FLOOR=floor,
            AWAIT=tiles.awaits,
            **sizes(p),
        )[::-1]

    result = run(x, transposed(x), state, weight, added, normalizer, own_norm)
    return result if normalizer is not None else result[0]
