"""What one token per row reads from its state: y = phi^T S, in a single pass over S.

The state is far larger than everything else that a step of decoding touches, so this is a question of bandwidth. It
lies in one stack for all layers of a model, from which the kernel reads the layer it is told: a slice of the stack as
its operand would be a copy.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, rows
from pallas_kernels.device import in_32_bits

HEIGHT = 64  # rows of the state that a program reads at a time
WIDTH = 64  # values
TILE_SHAPE = (HEIGHT, WIDTH)
PROGRAMS = 1056  # that share the work, at least: eight for each multiprocessor of an H200


@in_32_bits
def query_step(stack, layer, phi):
    """sum_d phi_d S_d of one layer of a stack, for every batch entry and query head.

    Args:
      stack: states [L, B, G, D, V], float32 or bfloat16; D >= 64, V = 64.
      layer: which of the L, int32 [].
      phi: features [B, G, R, D] float32, R <= 4.

    Returns:
      [B, G, R, V] float32.
    """
    _, batch, groups, features, width = stack.shape
    repeats = phi.shape[2]
    count = -(-features // HEIGHT)
    splits = max(1, min(count // 2, -(-PROGRAMS // (batch * groups))))
    per_split = -(-count // splits)
    splits = -(-count // per_split)

    def body(layer_ref, stack_ref, phi_ref, y_ref):
        b, g, split = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("split")
        layer = layer_ref[0]
        last = lax.min((split + 1) * per_split, count) - 1

        def load(n):
            """Tile n of the state; the last one ends with it."""
            start = lax.min(n * HEIGHT, features - HEIGHT)
            tile = stack_ref.at[layer, b, g, pl.ds(start, HEIGHT)]
            return plgpu.load(tile, layout=TILE, optimized=False)

        def step(n, carry):
            tile, sums = carry
            upcoming = load(lax.min(n + 1, last))  # used in the next turn
            factors = (plgpu.load(phi_ref.at[b, g, r, n], layout=ROW, optimized=False) for r in range(repeats))
            tile = tile.astype(jnp.float32)
            return upcoming, tuple(acc + tile * rows(factor, TILE_SHAPE) for acc, factor in zip(sums, factors))

        zero = plgpu.layout_cast(jnp.zeros(TILE_SHAPE, jnp.float32), TILE)
        first = split * per_split
        _, sums = lax.fori_loop(first, last + 1, step, (load(first), (zero,) * repeats))
        for r, acc in enumerate(sums):
            y_ref[split, b, g, r] = acc.sum(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, batch, groups, repeats, width), jnp.float32),
        grid=(batch, groups, splits),
        grid_names=("b", "g", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="query_step",
    )
    return kernel(jnp.reshape(layer, (1,)), stack, _tiles(phi, count)).sum(0)


def _tiles(phi, count: int):
    """[..., D] as [..., count, HEIGHT]; the last tile overlaps the one before it, and is 0 where it does."""
    features = phi.shape[-1]
    whole = features // HEIGHT * HEIGHT
    tiles = phi[..., :whole].reshape(*phi.shape[:-1], -1, HEIGHT)
    if whole == features:
        return tiles
    last = jnp.where(jnp.arange(HEIGHT) >= HEIGHT - (features - whole), phi[..., -HEIGHT:], 0)
    return jnp.concatenate([tiles, last[..., None, :]], axis=-2)
