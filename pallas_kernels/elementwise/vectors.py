"""Numbers along the channels, spread over the 128 threads of a warpgroup: device memory to registers and back."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.device import multiprocessors

THREADS = 128
PROGRAMS = 4  # of a kernel, on a multiprocessor at a time
PIECES = 1024, 512  # channels at a time: 8 or 4 a thread, 16 or 8 bytes of bfloat16


def programs_at_once() -> int:
    """How many programs share the work of a kernel."""
    return PROGRAMS * multiprocessors()


def piece_of(channels: int) -> int | None:
    """The most channels at a time that divide `channels`, or None."""
    return next((size for size in PIECES if channels % size == 0), None)


def pieces(channels: int) -> list[pl.Slice]:
    """Slices that cover the channels."""
    size = piece_of(channels)
    return [pl.ds(start, size) for start in range(0, channels, size)]


def layout(channels: pl.Slice) -> plgpu.Layout.WG_STRIDED:
    """Each thread has as many neighbours as one access of memory takes."""
    return plgpu.Layout.WG_STRIDED((channels.size,), vec_size=channels.size // THREADS)


def load(ref, index: tuple, channels: pl.Slice):
    """ref[*index, channels]."""
    return plgpu.load(ref.at[*index, channels], layout=layout(channels))


def wide(x):
    """x in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), x)


def zeros(channels: pl.Slice) -> jax.Array:
    """Zeros of float32 in the place of what `load` returns."""
    return plgpu.layout_cast(jnp.zeros((channels.size,), jnp.float32), layout(channels))
