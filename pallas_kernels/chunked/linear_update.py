"""What each chunk adds to a state of the linear score: S = sum_t weight_t x_t w_t^T and z = sum_t factor_t x_t."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, ROW, TILE, Scratch, columns, load_vector, operand, read
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.launch import launch

SIZE = 64  # features of a program, and tokens at a time
STAGES = 4


class Inputs(NamedTuple):
    """Arrays of the kernel; vectors: the weight and the factor, where there are any."""

    x: Any
    w: Any
    vectors: list[Any]


class Outputs(NamedTuple):
    """What it writes."""

    s: Any
    z: Any


@functools.partial(jax.jit, static_argnames="problem")
def update(problem: Problem, x, w, weight, *, factor=None):
    """S [B, G, N, K, V] and z [B, G, N, K] float32, summed over the tokens of each chunk and the heads of each group.

    A program of one warpgroup takes 64 features of one chunk of a group. The left operand of its products, x^T times
    the weight of every token, is formed in registers and rounded; z is summed there in float32.

    Args:
      problem: sizes; its heads are those of x and w.
      x: [B, T, H, K] bfloat16, K = 64 or 128.
      w: [B, T, H, V] bfloat16, V = K.
      weight: [B, H, T] float32; None is 1.
      factor: [B, H, T] float32; None: the weight.
    """
    p = problem
    dim, width = x.shape[-1], w.shape[-1]
    parts, blocks = dim // SIZE, p.chunk // SIZE
    steps = p.repeats * blocks
    stages = min(STAGES, steps)
    vectors = [vector for vector in (weight, factor) if vector is not None]

    def body(refs):
        inputs, outputs, scratch = refs
        full, memory = scratch.full, Scratch.of(scratch.accumulators, 0)
        # Groups of a chunk, which are beside each other in memory, follow each other.
        at, part = split_index(lax.axis_index("program"), parts)
        at, g = split_index(at, p.groups)
        b, c = split_index(at, p.chunks)
        features = pl.ds(part * SIZE, SIZE)

        def fill(n):
            slot = lax.rem(n, stages)
            r, block = split_index(n, blocks)
            h, tokens = g * p.repeats + r, pl.ds(c * p.chunk + block * SIZE, SIZE)
            plgpu.copy_gmem_to_smem(inputs.x.at[b, tokens, h, features], scratch.x.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(inputs.w.at[b, tokens, h], scratch.w.at[slot], full.at[slot])
            for i, vector in enumerate(inputs.vectors):
                plgpu.copy_gmem_to_smem(vector.at[b, h, tokens], scratch.vectors.at[i, slot], full.at[slot])

        def accumulate(acc):
            def add(n, z):
                slot = lax.rem(n, stages)
                plgpu.barrier_wait(full.at[slot])
                left = plgpu.load(scratch.x.at[slot].T, layout=TILE)
                number = left.astype(jnp.float32)
                weighted = []
                for i in range(len(vectors)):
                    of_token = load_vector(scratch.vectors.at[i, slot], COLUMN)
                    weighted.append(number * columns(of_token, left.shape))
                if weight is not None:
                    left = weighted[0].astype(jnp.bfloat16)
                memory.add(acc, left, scratch.w.at[slot])
                z = z + (weighted[-1] if weighted else number).sum(axis=1)
                memory.wait(0)
                plgpu.commit_smem()
                pl.when(n + stages < steps)(lambda: fill(n + stages))
                return z

            z = lax.fori_loop(0, steps, add, plgpu.layout_cast(jnp.zeros((SIZE,), jnp.float32), ROW))
            outputs.s[b, g, c, features] = read(acc)
            outputs.z[b, g, c, features] = z

        for n in range(stages):
            fill(n)
        memory.accumulate(accumulate, (SIZE, width))

    shape = (p.batch, p.groups, p.chunks, dim)
    return launch(
        body,
        Inputs(x, w, vectors),
        Outputs(jax.ShapeDtypeStruct((*shape, width), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)),
        {
            "x": operand((stages, SIZE, SIZE)),
            "w": operand((stages, SIZE, width)),
            "vectors": plgpu.SMEM((2, stages, SIZE), jnp.float32),
            "full": plgpu.Barrier(num_barriers=stages, num_arrivals=2 + len(vectors)),
            "accumulators": Scratch.types(p.interpret, 1, ((SIZE, width),) * 2, SIZE),
        },
        grid=(p.batch * p.chunks * p.groups * parts,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_update",
    )
