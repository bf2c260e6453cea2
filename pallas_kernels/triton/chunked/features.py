"""The pairs of features that the rows of a squared state stand for, computed inside kernels; see `chunked.layout`.

A row of a tile is a pair (a, b). The kernels take tiles in twos. Of both, row r has the b of `right(kind, r)`; an a is
the feature of a token or of another by `left`, which reads them from `words`: a load of a 32-bit word can be prefetched
into shared memory, one of a bfloat16 number cannot.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl


def words(x: jax.Array) -> jax.Array:
    """[B, T, H, K] bfloat16 as [B, H, K / 2, T] int32, the features 2 i and 2 i + 1 of a token to a word.

    Behind a barrier a transposition moves memory and no more: fused with what makes x, it would read that by columns.
    """
    pairs = jax.lax.optimization_barrier(x).reshape(*x.shape[:-1], -1, 2)
    return jnp.moveaxis(jax.lax.bitcast_convert_type(pairs, jnp.int32), 1, 3)


@triton.jit
def halves(word):
    """The two features of words."""
    return word.to(tl.int16).to(tl.bfloat16, bitcast=True), (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def left(words_ptr, TOKENS: tl.constexpr, KIND: tl.constexpr, tile, row, AXIS: tl.constexpr):
    """The a of each row, in a tile and in the next one; for pointers to the first words of tokens, along another axis.

    row: [64, 1] or [1, 64], and the tokens' axis is inserted at AXIS, 1 or 0.
    """
    if KIND == 0:
        first = tile // 2
    elif KIND == 1:
        first = tile // 2 + 16
    else:
        first = tile - 16
    one, two = halves(tl.load(words_ptr + first * TOKENS))
    one, two = tl.expand_dims(one, AXIS), tl.expand_dims(two, AXIS)
    if KIND > 0:
        second = tile // 2 if KIND == 1 else tile - 15
        three, four = halves(tl.load(words_ptr + second * TOKENS))
        three, four = tl.expand_dims(three, AXIS), tl.expand_dims(four, AXIS)
        if KIND == 1:
            one, two = tl.where(row < 16, one, three), tl.where(row < 16, two, four)
        else:
            one, two = tl.where(row < 32, one, two), tl.where(row < 32, three, four)
    return one, two


@triton.jit
def right(KIND: tl.constexpr, row):
    """The b of each row, in runs of 16."""
    if KIND == 0:
        b = row
    elif KIND == 1:
        b = tl.where(row < 16, row + 48, row)
    else:
        b = 32 + row % 32
    return tl.max_contiguous(tl.multiple_of(b, 16), 16)


@triton.jit
def multiplicity(KIND: tl.constexpr, row):
    """How many of the entries (a, b) and (b, a) of a full matrix each row stands for."""
    if KIND == 0:
        once = row < 16
    elif KIND == 1:
        once = row < 32
    else:
        once = row % 32 < 16
    return tl.where(once, 1.0, 2.0)


@triton.jit
def row_of(a, b):
    """The row of a state that holds the pair (a, b) or, if b lies in an earlier block of 16 than a, the pair (b, a)."""
    return tl.where(b < a // 16 * 16, _start(b) + a, _start(a) + b)


@triton.jit
def _start(a):
    """The row that (a, 0) would have."""
    return tl.where(a < 32, a * 64, tl.where(a < 48, a * 32 + 992, a * 64 - 2096))
