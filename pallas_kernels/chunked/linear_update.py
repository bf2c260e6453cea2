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
from pallas_kernels.chunked.tokens import SIZE, Tokens
from pallas_kernels.launch import Refs, launch

FEATURES = 64  # of a program


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    x: Any
    w: Any
    weight: Any | None
    factor: Any | None

    @property
    def vectors(self) -> list[Any]:
        """The weight and the factor, where there are any."""
        return [vector for vector in (self.weight, self.factor) if vector is not None]


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
    p, tokens = problem, Tokens(problem)
    dim, width = x.shape[-1], w.shape[-1]
    inputs = Inputs(x, w, weight, factor)
    shape = (p.batch, p.groups, p.chunks, dim)
    return launch(
        functools.partial(_body, tokens),
        inputs,
        Outputs(jax.ShapeDtypeStruct((*shape, width), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)),
        {
            "x": operand((tokens.stages, SIZE, FEATURES)),
            "w": operand((tokens.stages, SIZE, width)),
            "vectors": plgpu.SMEM((2, tokens.stages, SIZE), jnp.float32),
            "full": plgpu.Barrier(num_barriers=tokens.stages, num_arrivals=2 + len(inputs.vectors)),
            "accumulators": Scratch.types(p.interpret, 1, ((FEATURES, width),) * 2, SIZE),
        },
        grid=(p.batch * p.chunks * p.groups * dim // FEATURES,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_update",
    )


def _body(tokens: Tokens, refs: Refs) -> None:
    inputs, outputs, scratch = refs
    memory, width = Scratch.of(scratch.accumulators, 0), inputs.w.shape[-1]
    place = _place(tokens.problem, inputs.x.shape[-1] // FEATURES)
    fill = functools.partial(_fill, tokens, refs, place)

    def past_tokens(acc):
        zero = plgpu.layout_cast(jnp.zeros((FEATURES,), jnp.float32), ROW)
        z = tokens.each(scratch.full, functools.partial(_add, refs, memory, acc), fill, zero)
        outputs.s[place] = read(acc)
        outputs.z[place] = z

    for n in range(tokens.stages):
        fill(n)
    memory.accumulate(past_tokens, (FEATURES, width))


def _place(problem: Problem, parts: int):
    """Batch entry, group, chunk and features of a program: their index in the outputs.

    Groups of a chunk, which are beside each other in memory, follow each other.
    """
    at, part = split_index(lax.axis_index("program"), parts)
    at, g = split_index(at, problem.groups)
    b, c = split_index(at, problem.chunks)
    return b, g, c, pl.ds(part * FEATURES, FEATURES)


def _fill(tokens: Tokens, refs: Refs, place, n) -> None:
    """Loads the tokens of the n-th step."""
    inputs, _, scratch = refs
    b, g, c, features = place
    slot = tokens.slot(n)
    h, rows = tokens.of(g, c, n)
    full = scratch.full.at[slot]
    plgpu.copy_gmem_to_smem(inputs.x.at[b, rows, h, features], scratch.x.at[slot], full)
    plgpu.copy_gmem_to_smem(inputs.w.at[b, rows, h], scratch.w.at[slot], full)
    for i, vector in enumerate(inputs.vectors):
        plgpu.copy_gmem_to_smem(vector.at[b, h, rows], scratch.vectors.at[i, slot], full)


def _add(refs: Refs, memory: Scratch, acc, slot, z):
    """Adds the tokens in a buffer to S, and to z, which it returns."""
    inputs, _, scratch = refs
    left = plgpu.load(scratch.x.at[slot].T, layout=TILE)
    number = left.astype(jnp.float32)
    weighted = []
    for i in range(len(inputs.vectors)):
        of_token = load_vector(scratch.vectors.at[i, slot], COLUMN)
        weighted.append(number * columns(of_token, left.shape))
    if inputs.weight is not None:
        left = weighted[0].astype(jnp.bfloat16)
    memory.add(acc, left, scratch.w.at[slot])
    z = z + (weighted[-1] if weighted else number).sum(axis=1)
    memory.wait(0)
    return z
