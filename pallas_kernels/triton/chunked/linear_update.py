"""What each chunk adds to a state of the linear score: S = sum_t weight_t x_t w_t^T and z = sum_t factor_t x_t."""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.place import sizes
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def linear_update_kernel(
    x_ptr,
    w_ptr,
    weight_ptr,
    factor_ptr,
    s_ptr,
    z_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A program sums FEATURES rows of the state of one chunk and group; factor_ptr None: of the weights.

    The left operand of its products, x^T times the weight of every token, is rounded; z is summed in float32.
    """
    repeats: tl.constexpr = HEADS // GROUPS
    chunks: tl.constexpr = TOKENS // CHUNK
    parts: tl.constexpr = DIM // FEATURES
    program = tl.program_id(0).to(tl.int64)
    # Groups of a chunk, which are beside each other in memory, follow each other.
    part, at = program % parts, program // parts
    g, at = at % GROUPS, at // GROUPS
    c, b = at % chunks, at // chunks
    token, feature, e = tl.arange(0, BLOCK), tl.arange(0, FEATURES), tl.arange(0, DIM)
    own = ((b * TOKENS + c * CHUNK) * HEADS + g * repeats) * DIM
    x_ptr += own + part * FEATURES
    w_ptr += own
    of_head = (b * HEADS + g * repeats) * TOKENS + c * CHUNK
    state = ((b * GROUPS + g) * chunks + c) * DIM + part * FEATURES

    sums = tl.zeros((FEATURES, DIM), tl.float32)
    z = tl.zeros((BLOCK, FEATURES), tl.float32)
    for _ in range(0, repeats):
        for start in range(0, CHUNK, BLOCK):
            row = (start + token)[:, None] * (HEADS * DIM)
            x, w = tl.load(x_ptr + row + feature[None, :]), tl.load(w_ptr + row + e[None, :])
            number = x.to(tl.float32)
            if weight_ptr is None:
                weighted = number
            else:
                weighted = number * tl.load(weight_ptr + of_head + start + token)[:, None]
                x = weighted.to(x.dtype)
            sums = tl.dot(tl.trans(x), w, sums)
            if factor_ptr is None:
                z += weighted
            else:
                z += number * tl.load(factor_ptr + of_head + start + token)[:, None]
        x_ptr += DIM
        w_ptr += DIM
        of_head += TOKENS
    tl.store(s_ptr + (state + feature[:, None]) * DIM + e[None, :], sums)
    tl.store(z_ptr + state + feature, tl.sum(z, 0))


@functools.partial(jax.jit, static_argnames="problem")
def update(problem: Problem, x, w, weight, *, factor=None):
    """S [B, G, N, K, V] and z [B, G, N, K] float32, summed over the tokens of each chunk and the heads of each group.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, K] bfloat16, K = 64 or 128.
      w: [B, T, H, V] bfloat16, V = K.
      weight: [B, H, T] float32; None is 1.
      factor: [B, H, T] float32; None: the weight.
    """
    p, dim = problem, x.shape[-1]
    tiles = tiles_of("linear_update", dim)

    @batched
    def run(x, w, weight, factor):
        batch = x.shape[0]
        shape = (batch, p.groups, p.chunks, dim)
        features = dim // tiles.parts
        return call(
            linear_update_kernel,
            x,
            w,
            weight,
            factor,
            out_type=(jax.ShapeDtypeStruct((*shape, dim), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)),
            grid=(batch * p.groups * p.chunks * tiles.parts,),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="linear_update",
            BLOCK=tiles.block,
            DIM=dim,
            FEATURES=features,
            **sizes(p),
        )

    return run(x, w, weight, factor)
