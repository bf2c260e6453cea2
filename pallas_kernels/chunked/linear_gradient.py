"""The gradient of the tokens that read from, or were added to, a state of the linear score: dx_i = S w_i + z."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import TILE, Scratch, columns, operand, read, rows
from pallas_kernels.chunked.linear_rows import ROWS, Place, programs_of
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.launch import Refs, launch


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    w: Any
    state: Any
    added: Any
    x: Any | None
    weight: Any | None
    normalizer: Any | None
    factor: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    dx: Any
    sums: Any | None


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
    tile = operand((ROWS, dim))
    sums = jax.ShapeDtypeStruct((p.batch, p.heads, p.tokens), jnp.float32) if want_sums else None
    dx, sums = launch(
        functools.partial(_body, p),
        Inputs(w, state, added, x if want_sums else None, weight, normalizer, factor),
        Outputs(jax.ShapeDtypeStruct(added.shape, added.dtype), sums),
        {
            "w": tile,
            "x": tile,
            "state": operand((dim, dim)),
            "y": tile,
            "full": plgpu.Barrier(num_arrivals=4 if want_sums else 3),
            "accumulators": Scratch.types(p.interpret, 1, ((ROWS, dim),) * 2, dim),
        },
        grid=(programs_of(p),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_gradient",
    )
    return (dx, sums) if want_sums else (dx,)


def _body(problem: Problem, refs: Refs) -> None:
    inputs, outputs, scratch = refs
    at, memory = Place.of(problem, lax.axis_index("program")), Scratch.of(scratch.accumulators, 0)
    tiles = [(inputs.w, scratch.w), (inputs.added, scratch.y)]
    tiles += [] if inputs.x is None else [(inputs.x, scratch.x)]
    at.load(tiles, inputs.state, scratch.state, scratch.full)

    def multiply(acc):
        memory.add(acc, plgpu.load(scratch.w, layout=TILE), scratch.state.T)
        return read(acc)

    dx = memory.accumulate(multiply, scratch.w.shape)
    if inputs.weight is not None:
        dx = dx * rows(at.vector(inputs.weight, at.h), dx.shape)
    if inputs.normalizer is not None:
        z = columns(at.of_chunk(inputs.normalizer), dx.shape)
        dx = dx + (z if inputs.factor is None else z * rows(at.vector(inputs.factor, at.h), dx.shape))
    if outputs.sums is not None:
        x = plgpu.load(scratch.x, layout=TILE).astype(jnp.float32)
        outputs.sums[at.b, at.h, at.rows] = (x * dx).sum(axis=1)
    at.store(plgpu.load(scratch.y, layout=TILE).astype(jnp.float32) + dx, scratch.y, outputs.dx)
