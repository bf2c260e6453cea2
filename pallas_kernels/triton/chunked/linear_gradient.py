"""The gradient of the tokens that read from, or were added to, a state of the linear score: dx_i = S w_i + z."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.chunked.problem import Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.place import place, sizes
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def linear_gradient_kernel(
    x_ptr,
    w_ptr,
    weight_ptr,
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
):
    """A program takes ROWS rows of a head."""
    b, g, c, h, start = place(tl.program_id(0), TOKENS, HEADS, GROUPS, CHUNK, ROWS)
    state = ((b * GROUPS + g) * (TOKENS // CHUNK) + c) * DIM
    row, feature = tl.arange(0, ROWS), tl.arange(0, DIM)
    of_head = (b * HEADS + h) * TOKENS + start + row
    at = ((b * TOKENS + start) * HEADS + h) * DIM + row[:, None] * (HEADS * DIM) + feature[None, :]

    s = tl.load(s_ptr + (state + feature[:, None]) * DIM + feature[None, :])
    dx = tl.dot(tl.load(w_ptr + at), tl.trans(s))
    if weight_ptr is not None:
        dx *= tl.load(weight_ptr + of_head)[:, None]
    if normalizer_ptr is not None:
        z = tl.load(normalizer_ptr + state + feature)[None, :]
        if factor_ptr is None:
            dx += z
        else:
            dx += z * tl.load(factor_ptr + of_head)[:, None]
    if sums_ptr is not None:
        tl.store(sums_ptr + of_head, tl.sum(tl.load(x_ptr + at).to(tl.float32) * dx, 1))
    y = tl.load(added_ptr + at).to(tl.float32) + dx
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty))


@functools.partial(jax.jit, static_argnames=("problem", "want_sums"))
def gradient(problem: Problem, x, w, weight, state, added, *, normalizer=None, factor=None, want_sums: bool = False):
    """added + dx, with dx_i = weight_i S_c w_i + factor_i z_c and S_c, z_c the state of the token's chunk and group.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, K] bfloat16; only the sums below need it.
      w: [B, T, H, V] bfloat16.
      weight: [B, H, T] float32; None is 1.
      state: [B, G, N, K, V] bfloat16, V = K = 64 or 128.
      added: [B, T, H, K] bfloat16.
      normalizer: z [B, G, N, K] float32.
      factor: [B, H, T] float32; None is 1.
      want_sums: whether to return the sums below.

    Returns:
      [B, T, H, K] bfloat16, and if `want_sums` <x_i, dx_i> [B, H, T] float32.
    """
    p, dim = problem, w.shape[-1]
    tiles = tiles_of("linear_gradient", dim)
    rows = math.gcd(tiles.block, p.chunk)

    @batched
    def run(x, w, weight, state, added, normalizer, factor):
        outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
        absent = (None,)  # sums_ptr
        if want_sums:
            outputs.insert(0, jax.ShapeDtypeStruct((w.shape[0], p.heads, p.tokens), jnp.float32))
            absent = ()
        return call(
            linear_gradient_kernel,
            *(x, w, weight, state, added, normalizer, factor, *absent),
            out_type=tuple(outputs),
            grid=(w.shape[0] * p.heads * (p.tokens // rows),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="linear_gradient",
            ROWS=rows,
            DIM=dim,
            **sizes(p),
        )[::-1]

    return run(x if want_sums else None, w, weight, state, added, normalizer, factor)
