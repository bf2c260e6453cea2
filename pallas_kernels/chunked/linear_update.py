"""What each chunk adds to a state of the linear score: S = sum_t weight_t x_t w_t^T and z = sum_t factor_t x_t."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, ROW, TILE, Scratch, columns, operand, read
from pallas_kernels.chunked.problem import Problem, split_index

SIZE = 64  # features of a program, and tokens at a time
STAGES = 4


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

    def body(x_ref, w_ref, *refs):
        *vector_refs, s_ref, z_ref, x_s, w_s, vectors_s, full, scratch_buffers = refs
        # Groups of a chunk, which are beside each other in memory, follow each other.
        at, part = split_index(lax.axis_index("program"), parts)
        at, g = split_index(at, p.groups)
        b, c = split_index(at, p.chunks)
        features = pl.ds(part * SIZE, SIZE)
        scratch = Scratch.of(scratch_buffers, 0)

        def fill(n):
            slot = lax.rem(n, stages)
            r, block = split_index(n, blocks)
            h, tokens = g * p.repeats + r, pl.ds(c * p.chunk + block * SIZE, SIZE)
            plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, h, features], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(w_ref.at[b, tokens, h], w_s.at[slot], full.at[slot])
            for i, vector_ref in enumerate(vector_refs):
                plgpu.copy_gmem_to_smem(vector_ref.at[b, h, tokens], vectors_s.at[i, slot], full.at[slot])

        def accumulate(acc):
            def add(n, z):
                slot = lax.rem(n, stages)
                plgpu.barrier_wait(full.at[slot])
                left = plgpu.load(x_s.at[slot].T, layout=TILE)
                number = left.astype(jnp.float32)
                weighted = []
                for i in range(len(vectors)):
                    of_token = plgpu.load(vectors_s.at[i, slot], layout=COLUMN, optimized=False)
                    weighted.append(number * columns(of_token, left.shape))
                if weight is not None:
                    left = weighted[0].astype(jnp.bfloat16)
                scratch.add(acc, left, w_s.at[slot])
                z = z + (weighted[-1] if weighted else number).sum(axis=1)
                if not p.interpret:
                    plgpu.wgmma_wait(0)
                plgpu.commit_smem()
                pl.when(n + stages < steps)(lambda: fill(n + stages))
                return z

            z = lax.fori_loop(0, steps, add, plgpu.layout_cast(jnp.zeros((SIZE,), jnp.float32), ROW))
            s_ref[b, g, c, features] = read(acc)
            z_ref[b, g, c, features] = z

        for n in range(stages):
            fill(n)
        scratch.accumulate(accumulate, (SIZE, width))

    shape = (p.batch, p.groups, p.chunks, dim)
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((*shape, width), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=[
            operand((stages, SIZE, SIZE)),
            operand((stages, SIZE, width)),
            plgpu.SMEM((2, stages, SIZE), jnp.float32),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2 + len(vectors)),
            Scratch.types(p.interpret, 1, ((SIZE, width),) * 2, SIZE),
        ],
        grid=(p.batch * p.chunks * p.groups * parts,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_update",
    )
    return kernel(x, w, *vectors)
