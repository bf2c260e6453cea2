"""What the tokens of each chunk read from the state of the linear score before it: N_i = S^T x_i."""

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

    x: Any
    state: Any
    added: Any
    weight: Any | None
    normalizer: Any | None
    own_norm: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    y: Any
    norm: Any | None


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
    norm = None if normalizer is None else jax.ShapeDtypeStruct(own_norm.shape, jnp.float32)
    y, norm = launch(
        functools.partial(_body, p, power, floor),
        Inputs(x, state, added, weight, normalizer, own_norm),
        Outputs(jax.ShapeDtypeStruct(added.shape, added.dtype), norm),
        {
            "x": operand((ROWS, dim)),
            "state": operand((dim, dim)),
            "y": operand((ROWS, dim)),
            "full": plgpu.Barrier(num_arrivals=3),
            "accumulators": Scratch.types(p.interpret, 1, ((ROWS, dim),) * 2, dim),
        },
        grid=(programs_of(p),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_query",
    )
    return y if normalizer is None else (y, norm)


def _body(problem: Problem, power: float, floor: float, refs: Refs) -> None:
    inputs, outputs, scratch = refs
    at, memory = Place.of(problem, lax.axis_index("program")), Scratch.of(scratch.accumulators, 0)
    at.load(((inputs.x, scratch.x), (inputs.added, scratch.y)), inputs.state, scratch.state, scratch.full)
    left = plgpu.load(scratch.x, layout=TILE) * power

    def multiply(acc):
        memory.add(acc, left, scratch.state)
        return read(acc)

    y = memory.accumulate(multiply, left.shape)
    through = None
    if inputs.weight is not None:
        through = at.vector(inputs.weight, at.g)
        y = y * rows(through, y.shape)
    inside = plgpu.load(scratch.y, layout=TILE).astype(jnp.float32)
    y = inside + y if inputs.normalizer is None else _divide(refs, at, inside, left, through, y, floor)
    at.store(y, scratch.y, outputs.y)


def _divide(refs: Refs, at: Place, inside, x, through, y, floor: float):
    """(n inside + y) / (n + through <z, x>), where log2 n is `own_norm`; writes log2 of the divisor."""
    inputs, outputs, _ = refs
    read_norm = (x.astype(jnp.float32) * columns(at.of_chunk(inputs.normalizer), x.shape)).sum(axis=1)
    read_norm = jnp.maximum(read_norm, 0.0)
    read_norm = read_norm if through is None else read_norm * through
    norm = at.vector(inputs.own_norm, at.h)
    norm = jnp.exp2(jnp.where(norm == jnp.inf, -jnp.inf, norm))
    total = norm + read_norm
    dead = total < floor
    y = (inside * rows(norm, y.shape) + y) * rows(jnp.where(dead, 0.0, 1.0 / total), y.shape)
    outputs.norm[at.b, at.h, at.rows] = jnp.where(dead, jnp.inf, jnp.log2(total))
    return y
