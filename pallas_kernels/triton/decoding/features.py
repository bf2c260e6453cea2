"""The features of a vector of 64 numbers, formed where they are used."""

import math

import triton
import triton.language as tl

SQRT2 = tl.constexpr(math.sqrt(2))


@triton.jit
def features(x_ptr, index, SCALE: tl.constexpr, SIZE: tl.constexpr, SQUARED: tl.constexpr):
    """phi(SCALE x) in float32 at `index`: x itself, or blocks of x times x rotated by 0, 1, ... (`ops.score`)."""
    entry = index % SIZE
    x = tl.load(x_ptr + entry).to(tl.float32) * SCALE
    if SQUARED:
        offset = index // SIZE
        rotated = tl.load(x_ptr + (entry + offset) % SIZE).to(tl.float32) * SCALE
        x = x * tl.where(offset == 0, 1.0, SQRT2) * rotated
    return x
