"""What each chunk adds to the normaliser: Z = sum_t factor_t x_t x_t^T."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, TILE, Scratch, columns, load_vector, operand, read
from pallas_kernels.chunked.layout import HEAD_DIM
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.tokens import SIZE, Tokens
from pallas_kernels.launch import Refs, launch


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    x: Any
    factor: Any | None


@functools.partial(jax.jit, static_argnames="problem")
def normalizer(problem: Problem, x, factor):
    """[B, G, N, 64, 64] float32, summed over the tokens of each of N chunks and the heads of each of G groups.

    A program of one warpgroup takes one chunk of a group. The left operand of its products, x^T times the factor of
    every token, is formed in registers, as a sum of two bfloat16 numbers: together they err by 2^-17 at most.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, 64] bfloat16.
      factor: [B, H, T] float32; None is 1.
    """
    p, tokens = problem, Tokens(problem)
    return launch(
        functools.partial(_body, tokens),
        Inputs(x, factor),
        jax.ShapeDtypeStruct((p.batch, p.groups, p.chunks, HEAD_DIM, HEAD_DIM), jnp.float32),
        {
            "x": operand((tokens.stages, SIZE, HEAD_DIM)),
            "factor": plgpu.SMEM((tokens.stages, SIZE), jnp.float32),
            "full": plgpu.Barrier(num_barriers=tokens.stages, num_arrivals=1 if factor is None else 2),
            "accumulators": Scratch.types(p.interpret, 1, ((HEAD_DIM, HEAD_DIM),) * 2, SIZE),
        },
        grid=(p.batch, p.groups, p.chunks),
        grid_names=("b", "g", "c"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="squared_normalizer",
    )


def _body(tokens: Tokens, refs: Refs) -> None:
    memory = Scratch.of(refs.scratch.accumulators, 0)
    at = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("c")
    fill = functools.partial(_fill, tokens, refs, at)

    def past_tokens(acc):
        tokens.each(refs.scratch.full, functools.partial(_add, refs, memory, acc), fill, None)
        refs.outputs[at] = read(acc)

    for n in range(tokens.stages):
        fill(n)
    memory.accumulate(past_tokens, (HEAD_DIM, HEAD_DIM))


def _fill(tokens: Tokens, refs: Refs, at, n) -> None:
    """Loads the tokens of the n-th step."""
    inputs, _, scratch = refs
    b, g, c = at
    slot = tokens.slot(n)
    h, rows = tokens.of(g, c, n)
    plgpu.copy_gmem_to_smem(inputs.x.at[b, rows, h], scratch.x.at[slot], scratch.full.at[slot])
    if inputs.factor is not None:
        plgpu.copy_gmem_to_smem(inputs.factor.at[b, h, rows], scratch.factor.at[slot], scratch.full.at[slot])


def _add(refs: Refs, memory: Scratch, acc, slot, _) -> None:
    """Adds the tokens in a buffer."""
    inputs, _, scratch = refs
    left = plgpu.load(scratch.x.at[slot].T, layout=TILE)
    if inputs.factor is not None:
        factors = load_vector(scratch.factor.at[slot], COLUMN)
        scaled = left.astype(jnp.float32) * columns(factors, left.shape)
        # The barrier keeps the compiler from taking the rounded number for the number itself.
        left = lax.optimization_barrier(scaled.astype(jnp.bfloat16))
        memory.add(acc, (scaled - left.astype(jnp.float32)).astype(jnp.bfloat16), scratch.x.at[slot])
    memory.add(acc, left, scratch.x.at[slot])
    memory.wait(0)
