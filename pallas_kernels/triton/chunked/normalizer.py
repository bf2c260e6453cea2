"""What each chunk adds to the normaliser: Z = sum_t factor_t x_t x_t^T."""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.layout import HEAD_DIM
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.place import sizes
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def normalizer_kernel(
    x_ptr,
    factor_ptr,
    z_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
):
    """A program sums the matrix of one chunk and group.

    The left operand, x^T times the factor of every token, is a sum of two bfloat16 numbers: together they err by 2^-17
    at most.
    """
    repeats: tl.constexpr = HEADS // GROUPS
    chunks: tl.constexpr = TOKENS // CHUNK
    program = tl.program_id(0).to(tl.int64)
    c, at = program % chunks, program // chunks
    g, b = at % GROUPS, at // GROUPS
    feature, token = tl.arange(0, DIM), tl.arange(0, BLOCK)
    x_ptr += ((b * TOKENS + c * CHUNK) * HEADS + g * repeats) * DIM
    of_head = (b * HEADS + g * repeats) * TOKENS + c * CHUNK
    z = tl.zeros((DIM, DIM), tl.float32)
    for r in range(0, repeats):
        for start in range(0, CHUNK, BLOCK):
            x = tl.load(x_ptr + r * DIM + (start + token)[:, None] * (HEADS * DIM) + feature[None, :])
            if factor_ptr is None:
                z = tl.dot(tl.trans(x), x, z)
            else:
                factor = tl.load(factor_ptr + of_head + start + token)
                scaled = tl.trans(x).to(tl.float32) * factor[None, :]
                high = scaled.to(x.dtype)
                z = tl.dot((scaled - high.to(tl.float32)).to(x.dtype), x, z)
                z = tl.dot(high, x, z)
        of_head += TOKENS
    tl.store(z_ptr + program * DIM * DIM + feature[:, None] * DIM + feature[None, :], z)


@functools.partial(jax.jit, static_argnames="problem")
def normalizer(problem: Problem, x, factor):
    """[B, G, N, 64, 64] float32, summed over the tokens of each of N chunks and the heads of each of G groups.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, 64] bfloat16.
      factor: [B, H, T] float32; None is 1.
    """
    p, tiles = problem, tiles_of("squared_normalizer", HEAD_DIM)

    @batched
    def run(x, factor):
        batch = x.shape[0]
        return call(
            normalizer_kernel,
            x,
            factor,
            out_type=(jax.ShapeDtypeStruct((batch, p.groups, p.chunks, HEAD_DIM, HEAD_DIM), jnp.float32),),
            grid=(batch * p.groups * p.chunks,),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="squared_normalizer",
            BLOCK=tiles.block,
            DIM=HEAD_DIM,
            **sizes(p),
        )[0]

    return run(x, factor)
