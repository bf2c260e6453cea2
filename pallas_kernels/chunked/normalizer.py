"""What each chunk adds to the normaliser: Z = sum_t factor_t x_t x_t^T."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, TILE, Scratch, columns, load_vector, operand, read
from pallas_kernels.chunked.layout import HEAD_DIM
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.launch import launch

TOKENS = 64  # at a time
STAGES = 4


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
    p = problem
    blocks = p.chunk // TOKENS
    steps = p.repeats * blocks
    stages = min(STAGES, steps)

    def body(refs):
        inputs, outputs, scratch = refs
        full, memory = scratch.full, Scratch.of(scratch.accumulators, 0)
        b, g, c = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("c")

        def fill(n):
            slot = lax.rem(n, stages)
            r, block = split_index(n, blocks)
            h, tokens = g * p.repeats + r, pl.ds(c * p.chunk + block * TOKENS, TOKENS)
            plgpu.copy_gmem_to_smem(inputs.x.at[b, tokens, h], scratch.x.at[slot], full.at[slot])
            if factor is not None:
                plgpu.copy_gmem_to_smem(inputs.factor.at[b, h, tokens], scratch.factor.at[slot], full.at[slot])

        def accumulate(acc):
            def add(n, _):
                slot = lax.rem(n, stages)
                plgpu.barrier_wait(full.at[slot])
                left = plgpu.load(scratch.x.at[slot].T, layout=TILE)
                if factor is not None:
                    factors = load_vector(scratch.factor.at[slot], COLUMN)
                    scaled = left.astype(jnp.float32) * columns(factors, left.shape)
                    # The barrier keeps the compiler from taking the rounded number for the number itself.
                    left = lax.optimization_barrier(scaled.astype(jnp.bfloat16))
                    memory.add(acc, (scaled - left.astype(jnp.float32)).astype(jnp.bfloat16), scratch.x.at[slot])
                memory.add(acc, left, scratch.x.at[slot])
                memory.wait(0)
                plgpu.commit_smem()
                pl.when(n + stages < steps)(lambda: fill(n + stages))

            lax.fori_loop(0, steps, add, None)
            outputs[b, g, c] = read(acc)

        for n in range(stages):
            fill(n)
        memory.accumulate(accumulate, (HEAD_DIM, HEAD_DIM))

    return launch(
        body,
        Inputs(x, factor),
        jax.ShapeDtypeStruct((p.batch, p.groups, p.chunks, HEAD_DIM, HEAD_DIM), jnp.float32),
        {
            "x": operand((stages, TOKENS, HEAD_DIM)),
            "factor": plgpu.SMEM((stages, TOKENS), jnp.float32),
            "full": plgpu.Barrier(num_barriers=stages, num_arrivals=1 if factor is None else 2),
            "accumulators": Scratch.types(p.interpret, 1, ((HEAD_DIM, HEAD_DIM),) * 2, TOKENS),
        },
        grid=(p.batch, p.groups, p.chunks),
        grid_names=("b", "g", "c"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="squared_normalizer",
    )
