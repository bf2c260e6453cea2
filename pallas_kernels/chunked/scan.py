"""The states before each chunk, from what each chunk adds."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW


@functools.partial(jax.jit, static_argnames=("reverse", "dtype"))
def scan(added, weight, initial, *, reverse: bool = False, dtype=jnp.bfloat16):
    """S_c = weight_c S_{c-1} + added_c over N chunks; backwards from the last chunk if `reverse`.

    A program of one warpgroup carries one tile of one state in registers past all chunks.

    Args:
      added: [B, G, N, tiles, rows, V] float32; or [B, G, N, tiles, 64], of vectors.
      weight: [B, G, N] float32.
      initial: [B, G, tiles, ...] float32, the state before the first step; None is 0.
      reverse: whether the last chunk is the first step.
      dtype: of the states before each step.

    Returns:
      The state before each step [B, G, N, tiles, ...], and the state after the last [B, G, tiles, ...] float32.
    """
    batch, groups, chunks, tiles, *tile_shape = added.shape
    layout = ROW if len(tile_shape) == 1 else plgpu.Layout.WG_STRIDED(tuple(tile_shape), vec_size=4)

    def body(added_ref, weight_ref, *refs):
        *initial_ref, before_ref, final_ref = refs
        b, g, tile = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("tile")

        def load(ref):
            return plgpu.load(ref, layout=layout, optimized=layout is not ROW)

        def step(n, carry):
            state, upcoming, factor = carry
            c = chunks - 1 - n if reverse else n
            after = lax.max(c - 1, 0) if reverse else lax.min(c + 1, chunks - 1)
            # What is loaded here is used in the next turn.
            next_upcoming, next_factor = load(added_ref.at[b, g, after, tile]), weight_ref[b, g, after]
            before_ref[b, g, c, tile] = state.astype(dtype)
            return state * factor + upcoming, next_upcoming, next_factor

        first = chunks - 1 if reverse else 0
        if initial_ref:
            state = load(initial_ref[0].at[b, g, tile])
        else:
            state = plgpu.layout_cast(jnp.zeros(tile_shape, jnp.float32), layout)
        carry = state, load(added_ref.at[b, g, first, tile]), weight_ref[b, g, first]
        final_ref[b, g, tile] = lax.fori_loop(0, chunks, step, carry)[0]

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(added.shape, dtype),
            jax.ShapeDtypeStruct((batch, groups, tiles, *tile_shape), jnp.float32),
        ),
        grid=(batch, groups, tiles),
        grid_names=("b", "g", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="scan_backward" if reverse else "scan",
    )
    return kernel(added, weight, *(() if initial is None else (initial,)))
