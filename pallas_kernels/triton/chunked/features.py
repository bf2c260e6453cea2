"""The pairs of features that the rows of a squared state stand for, computed inside kernels; see `chunked.layout`.

The kernels multiply a matrix of features by one feature more, in registers, and give the product to the tensor cores.
Triton does so where that product is made of loads and constants alone; made of anything else, such as a mask by
`tl.arange`, it goes through shared memory on its way. So does it where a load is of 32-bit numbers.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl


def transposed(x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, H, K, T]: a feature of consecutive tokens lies together.

    Behind a barrier a transposition moves memory and no more: fused with what makes x, it would read that by columns.
    """
    return jnp.moveaxis(jax.lax.optimization_barrier(x), 1, 3)


@triton.jit
def left(xt_ptr, TOKENS: tl.constexpr, KIND: tl.constexpr, tile, row):
    """The a of each row of a tile [64, 1] for every token, of pointers to the tokens' first features."""
    if KIND == 0:
        a = tl.load(xt_ptr + tile * TOKENS)[None, :]
    elif KIND == 1:
        first, second = tl.load(xt_ptr + (tile + 32) * TOKENS), tl.load(xt_ptr + tile * TOKENS)
        a = tl.where(row < 16, first[None, :], second[None, :])
    else:
        first, second = tl.load(xt_ptr + (2 * tile - 32) * TOKENS), tl.load(xt_ptr + (2 * tile - 31) * TOKENS)
        a = tl.where(row < 32, first[None, :], second[None, :])
    return a


@triton.jit
def right(KIND: tl.constexpr, row):
    """The b of each row of a tile."""
    if KIND == 0:
        b = row
    elif KIND == 1:
        b = tl.where(row < 16, row + 48, row)
    else:
        b = 32 + row % 32
    return b


@triton.jit
def row_of(a, b):
    """The row of a state that holds the pair (a, b) or, if b lies in an earlier block of 16 than a, the pair (b, a)."""
    return tl.where(b < a // 16 * 16, _start(b) + a, _start(a) + b)


@triton.jit
def _start(a):
    """The row that (a, 0) would have."""
    return tl.where(a < 32, a * 64, tl.where(a < 48, a * 32 + 992, a * 64 - 2096))
