"""What the tokens of each chunk read from the state of the linear score before it: N_i = S^T x_i."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.place import place, sizes
from pallas_kernels.triton.chunked.quotient import quotient
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def linear_query_kernel(
    x_ptr,
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
    POWER: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """A program takes ROWS rows of a head."""
    b, g, c, h, start = place(tl.program_id(0), TOKENS, HEADS, GROUPS, CHUNK, ROWS)
    state = ((b * GROUPS + g) * (TOKENS // CHUNK) + c) * DIM
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    of_head = (b * HEADS + h) * TOKENS + start + row
    at = ((b * TOKENS + start) * HEADS + h) * DIM + row[:, None] * (HEADS * DIM) + feature[None, :]

    x = tl.load(x_ptr + at)
    sums = tl.dot(x, tl.load(s_ptr + (state + feature[:, None]) * DIM + feature[None, :])) * POWER
    y = tl.load(added_ptr + at).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + (b * GROUPS + g) * TOKENS + start + row)
        sums *= weight[:, None]
    if normalizer_ptr is None:
        y += sums
    else:
        z = tl.load(normalizer_ptr + state + feature)
        through = tl.maximum(tl.sum(x.to(tl.float32) * z[None, :], 1) * POWER, 0.0)
        if weight_ptr is not None:
            through *= weight
        y, norm = quotient(y, tl.load(own_norm_ptr + of_head), sums, through, FLOOR)
        tl.store(norm_ptr + of_head, norm)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@functools.partial(jax.jit, static_argnames=("problem", "power", "floor"))
def query(problem: Problem, x, state, weight, added, *, power: float = 1.0, normalizer=None, own_norm=None, floor=0.0):
    """added + weight N, with N_i = S_c^T (power x_i) and S_c the state of the token's chunk and group.

    With a normaliser, weights are divided by their sum: added is a quotient whose denominator n has log2 n = own_norm,
    and the result is (n added + weight N) / (n + weight n'), n'_i = <z_c, power x_i> in float32 and at least 0; where
    the denominator is below `floor`, 0.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, K] bfloat16.
      state: [B, G, N, K, V] bfloat16, V = K = 64 or 128.
      weight: [B, G, T] float32; None is 1.
      added: [B, T, H, V] bfloat16.
      power: a power of two.
      normalizer: z [B, G, N, K] float32.
      own_norm: [B, H, T] float32.
      floor: for denominators.

    Returns:
      [B, T, H, V] bfloat16, and with a normaliser log2 of the denominators [B, H, T] float32, +inf below `floor`.
    """
    p, dim = problem, x.shape[-1]
    tiles = tiles_of("linear_query", dim)
    rows = math.gcd(tiles.block, p.chunk)

    @batched
    def run(x, state, weight, added, normalizer, own_norm):
        outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
        absent = (None,)  # norm_ptr
        if normalizer is not None:
            outputs.insert(0, jax.ShapeDtypeStruct(own_norm.shape, jnp.float32))
            absent = ()
        return call(
            linear_query_kernel,
            *(x, state, weight, added, normalizer, own_norm, *absent),
            out_type=tuple(outputs),
            grid=(x.shape[0] * p.heads * (p.tokens // rows),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="linear_query",
            ROWS=rows,
            DIM=dim,
            POWER=power,
            FLOOR=floor,
            **sizes(p),
        )[::-1]

    result = run(x, state, weight, added, normalizer, own_norm)
    return result if normalizer is not None else result[0]
