"""The states before each chunk, from what each chunk adds."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW
from pallas_kernels.launch import Refs, launch

AHEAD_SIZE, MOST_AHEAD = 4096, 8  # entries of tiles that are loaded at a time, 32 registers; and tiles
HEIGHT = 16  # rows of a piece of a tile


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    added: Any
    weight: Any
    initial: Any | None
    other: Any | None
    counts: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    before: Any
    final: Any
    inner: Any | None


class Step(NamedTuple):
    """What is loaded of a step: of one tile, by pieces."""

    added: list
    weight: Any
    other: list | None


@functools.partial(jax.jit, static_argnames=("reverse", "dtype", "parts"))
def scan(added, weight, initial, *, reverse: bool = False, dtype=jnp.bfloat16, parts: int = 1, other=None, counts=None):
    """S_c = weight_c S_{c-1} + added_c over N chunks; backwards from the last chunk if `reverse`.

    A program of one warpgroup carries one tile of one state in registers past all chunks, several to a turn: what it
    loads in one turn it adds in the next.

    Args:
      added: [B, G, N, tiles, rows, V] float32, rows a multiple of 16; or [B, G, N, tiles, 64], of vectors.
      weight: [B, G, N] float32.
      initial: [B, G, tiles, ...] float32, the state before the first step; None is 0.
      reverse: whether the last chunk is the first step.
      dtype: of the states before each step.
      parts: 2: these states are the sums of two such numbers each.
      other: other states before each step [B, G, N, tiles, rows, V], to be multiplied with.
      counts: [tiles, rows / 16] float32, how often the entries of every 16 rows count in these products.

    Returns:
      The state before each step [B, G, N, tiles, ...], or [B, G, N, 2, tiles, ...] in parts, and the state after the
      last [B, G, tiles, ...] float32; with `other` also the inner products of the two states before each step
      [B, G, N, tiles] float32, to be summed.
    """
    batch, groups, chunks, tiles, *tile_shape = added.shape
    ahead = min(max(1, AHEAD_SIZE // math.prod(tile_shape)), MOST_AHEAD)
    before = (*added.shape[:3], *((parts,) if parts > 1 else ()), tiles, *tile_shape)
    final = jax.ShapeDtypeStruct((batch, groups, tiles, *tile_shape), jnp.float32)
    inner = None if other is None else jax.ShapeDtypeStruct((batch, groups, chunks, tiles), jnp.float32)
    written = launch(
        functools.partial(_body, ahead, reverse, parts),
        Inputs(added, weight, initial, other, counts),
        Outputs(jax.ShapeDtypeStruct(before, dtype), final, inner),
        {},
        grid=(batch, groups, tiles),
        grid_names=("b", "g", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="scan_backward" if reverse else "scan",
    )
    return written[:2] if other is None else tuple(written)


def _body(ahead: int, reverse: bool, parts: int, refs: Refs) -> None:
    inputs, outputs, _ = refs
    b, g, tile = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("tile")
    _, _, chunks, _, *tile_shape = inputs.added.shape
    pieces, dtype = _Pieces.of(tile_shape), outputs.before.dtype
    counts = [None if inputs.counts is None else inputs.counts[tile, j] for j in range(pieces.number)]

    def chunk(n):
        """That of the n-th step; beyond the last step, the last one's."""
        n = lax.min(n, chunks - 1)
        return chunks - 1 - n if reverse else n

    def load_step(n):
        at = b, g, chunk(n), tile
        other = None if inputs.other is None else pieces.load(inputs.other.at[at])
        return Step(pieces.load(inputs.added.at[at]), inputs.weight[at[:3]], other)

    def advance(n, state, step: Step):
        of_chunk = b, g, chunk(n)
        if parts == 1:
            pieces.store(outputs.before.at[*of_chunk, tile], state)
        else:
            high = [x.astype(dtype) for x in state]
            low = [(x - rounded.astype(x.dtype)).astype(dtype) for x, rounded in zip(state, high, strict=True)]
            pieces.store(outputs.before.at[*of_chunk, 0, tile], high)
            pieces.store(outputs.before.at[*of_chunk, 1, tile], low)
        if step.other is not None:
            products = [_product(*of_piece) for of_piece in zip(state, step.other, counts, strict=True)]
            outputs.inner[*of_chunk, tile] = sum(products[1:], products[0]).sum()
        return [x * step.weight + added for x, added in zip(state, step.added, strict=True)]

    def turn(i, carry):
        state, loaded = carry
        upcoming = [load_step((i + 1) * ahead + j) for j in range(ahead)]
        for j, step in enumerate(loaded):
            state = advance(i * ahead + j, state, step)
        return state, upcoming

    state = pieces.zeros() if inputs.initial is None else pieces.load(inputs.initial.at[b, g, tile])
    turns, rest = divmod(chunks, ahead)
    state, loaded = lax.fori_loop(0, turns, turn, (state, [load_step(j) for j in range(ahead)]))
    for j in range(rest):
        state = advance(turns * ahead + j, state, loaded[j])
    pieces.store(outputs.final.at[b, g, tile], state)


class _Pieces(NamedTuple):
    """The pieces of a tile, of 16 rows each, or the vector that it is: how many, their shape and layout."""

    number: int
    shape: tuple[int, ...]
    layout: Any

    @staticmethod
    def of(tile: Sequence[int]) -> "_Pieces":
        """Those of a tile of this shape."""
        if len(tile) == 1:
            return _Pieces(1, tuple(tile), ROW)
        shape = HEIGHT, tile[1]
        return _Pieces(tile[0] // HEIGHT, shape, plgpu.Layout.WG_STRIDED(shape, vec_size=4))

    def at(self, ref, j: int):
        """The j-th piece of a tile in device memory."""
        return ref if self.layout is ROW else ref.at[pl.ds(j * HEIGHT, HEIGHT)]

    def load(self, ref) -> list:
        """All pieces of a tile."""
        optimized = self.layout is not ROW
        return [plgpu.load(self.at(ref, j), layout=self.layout, optimized=optimized) for j in range(self.number)]

    def store(self, ref, state: list) -> None:
        """Stores all pieces, in ref's dtype."""
        for j, x in enumerate(state):
            self.at(ref, j)[...] = x.astype(ref.dtype)

    def zeros(self) -> list:
        """A state of zeros."""
        return [plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout) for _ in range(self.number)]


def _product(x, other, count):
    """x other, in float32, as often as it counts; None is once."""
    product = x * other.astype(x.dtype)
    return product if count is None else product * count
