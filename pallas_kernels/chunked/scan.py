"""The states before each chunk, from what each chunk adds."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW
from pallas_kernels.launch import Refs, launch

AHEAD_SIZE, MOST_AHEAD = 4096, 8  # entries of tiles that are loaded at a time, 32 registers; and tiles


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    added: Any
    weight: Any
    initial: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    before: Any
    final: Any


@functools.partial(jax.jit, static_argnames=("reverse", "dtype"))
def scan(added, weight, initial, *, reverse: bool = False, dtype=jnp.bfloat16):
    """S_c = weight_c S_{c-1} + added_c over N chunks; backwards from the last chunk if `reverse`.

    A program of one warpgroup carries one tile of one state in registers past all chunks, several to a turn: what it
    loads in one turn it adds in the next.

    Args:
      added: [B, G, N, tiles, rows, V] float32; or [B, G, N, tiles, 64], of vectors.
      weight: [B, G, N] float32.
      initial: [B, G, tiles, ...] float32, the state before the first step; None is 0.
      reverse: whether the last chunk is the first step.
      dtype: of the states before each step.

    Returns:
      The state before each step [B, G, N, tiles, ...], and the state after the last [B, G, tiles, ...] float32.
    """
    batch, groups, _, tiles, *tile_shape = added.shape
    ahead = min(max(1, AHEAD_SIZE // math.prod(tile_shape)), MOST_AHEAD)
    final = jax.ShapeDtypeStruct((batch, groups, tiles, *tile_shape), jnp.float32)
    return launch(
        functools.partial(_body, ahead, reverse),
        Inputs(added, weight, initial),
        Outputs(jax.ShapeDtypeStruct(added.shape, dtype), final),
        {},
        grid=(batch, groups, tiles),
        grid_names=("b", "g", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="scan_backward" if reverse else "scan",
    )


def _body(ahead: int, reverse: bool, refs: Refs) -> None:
    inputs, outputs, _ = refs
    b, g, tile = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("tile")
    _, _, chunks, _, *tile_shape = inputs.added.shape
    layout = ROW if len(tile_shape) == 1 else plgpu.Layout.WG_STRIDED(tuple(tile_shape), vec_size=4)

    def chunk(n):
        """That of the n-th step; beyond the last step, the last one's."""
        n = lax.min(n, chunks - 1)
        return chunks - 1 - n if reverse else n

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=layout is not ROW)

    def load_steps(n):
        steps = [chunk(n + i) for i in range(ahead)]
        return [(load(inputs.added.at[b, g, c, tile]), inputs.weight[b, g, c]) for c in steps]

    def advance(n, state, added_and_weight):
        outputs.before[b, g, chunk(n), tile] = state.astype(outputs.before.dtype)
        upcoming, factor = added_and_weight
        return state * factor + upcoming

    def turn(i, carry):
        state, loaded = carry
        upcoming = load_steps((i + 1) * ahead)
        for j, step in enumerate(loaded):
            state = advance(i * ahead + j, state, step)
        return state, upcoming

    if inputs.initial is not None:
        state = load(inputs.initial.at[b, g, tile])
    else:
        state = plgpu.layout_cast(jnp.zeros(tile_shape, jnp.float32), layout)
    turns, rest = divmod(chunks, ahead)
    state, loaded = lax.fori_loop(0, turns, turn, (state, load_steps(0)))
    for j in range(rest):
        state = advance(turns * ahead + j, state, loaded[j])
    outputs.final[b, g, tile] = state
