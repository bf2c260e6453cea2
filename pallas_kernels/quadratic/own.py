"""The tiles that the programs of a kernel own: where they are, and how their operands come to the warpgroups.

A program owns tiles of queries, past which keys and values pass; in the keys' kernel tiles of keys, past which queries
pass. Each consumer warpgroup has 64 rows of a tile.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import TILE
from pallas_kernels.quadratic.operands import Problem
from pallas_kernels.quadratic.tuning import ROWS, Tiles
from pallas_kernels.schedule import Schedule


class Place(NamedTuple):
    """Where a tile is.

    b: batch entry; h: head; g: key/value head; start: first row.
    """

    b: jax.Array
    h: jax.Array
    g: jax.Array
    start: jax.Array


class Rows(NamedTuple):
    """Where the rows of a warpgroup are.

    b, h, g, start: of their tile, as in `Place`; first: their first; warpgroup: its number.
    """

    b: jax.Array
    h: jax.Array
    g: jax.Array
    start: jax.Array
    first: jax.Array
    warpgroup: jax.Array

    @staticmethod
    def of(place: Place, warpgroup) -> "Rows":
        """Those of a warpgroup in a tile."""
        return Rows(*place, place.start + warpgroup * ROWS, warpgroup)

    @property
    def slice(self) -> pl.Slice:
        """Them as an index."""
        return pl.ds(self.first, ROWS)


@dataclasses.dataclass(frozen=True)
class OwnTiles:
    """The tiles of a call that programs own.

    Attributes:
      problem: the call.
      tiles: how the kernel cuts it.
      heads: that the rows have: H, in the keys' kernel G.
      schedule: which program owns which tile.
    """

    problem: Problem
    tiles: Tiles
    heads: int
    schedule: Schedule

    @staticmethod
    def make(problem: Problem, tiles: Tiles, heads: int, programs: int, *, ascending: bool) -> "OwnTiles":
        """Those of a call, shared by at most `programs`; `ascending` as in `Schedule`."""
        p = problem
        passing = 4 * p.tokens * p.head_dim * (p.heads // heads)  # bytes that pass the tiles of a head
        schedule = Schedule.make(p.batch * heads, p.tiles(tiles.own), passing, programs, ascending)
        return OwnTiles(problem, tiles, heads, schedule)

    def place(self, program, i) -> Place:
        """The program's i-th tile."""
        head, tile = self.schedule.tile(program, i)
        b, h = lax.div(head, self.heads), lax.rem(head, self.heads)
        repeats = self.heads // self.problem.kv_heads
        return Place(b, h, h if repeats == 1 else lax.div(h, repeats), tile * self.tiles.own)

    def barriers(self, operands: int):
        """The types of the barriers of `load` and `take`: of buffers that are full, and of those that are free."""
        consumers = self.tiles.consumers
        return plgpu.Barrier(num_barriers=consumers, num_arrivals=operands), plgpu.Barrier(num_barriers=consumers)

    def load(self, program, operands: Sequence[tuple[Any, Any]], barriers, passing) -> None:
        """Loads, in the producer warpgroup, the operands of all tiles of a program, and what passes them.

        Args:
          program: its number.
          operands: (array [B, T, heads, K], buffer [consumers, 64, K]) of each.
          barriers: as in `barriers`.
          passing: the `Keys` or `Queries`.
        """
        full, empty = barriers

        def load_tile(i, step):
            place = self.place(program, i)
            for w in range(self.tiles.consumers):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(empty.at[w]))
                at = Rows.of(place, w)
                for array, buffer in operands:
                    plgpu.copy_gmem_to_smem(array.at[at.b, at.slice, at.h], buffer.at[w], full.at[w])
            return passing.load(step, place.b, place.g, place.start)

        passing.ring.drain(self.schedule.each(program, load_tile, jnp.int32(0)))
        for w in range(self.tiles.consumers):
            plgpu.barrier_wait(empty.at[w])

    def take(self, buffers: Sequence[Any], barriers, warpgroup, power: float):
        """The operands of a warpgroup's products, the first times `power`: in registers if resident, or in the buffers.

        What stays in the buffers is to be given up by `give_up`.
        """
        full, empty = barriers
        own = [buffer.at[warpgroup] for buffer in buffers]
        plgpu.barrier_wait(full.at[warpgroup])
        first, *others = own
        scaled = plgpu.load(first, layout=TILE) * power
        if not self.tiles.resident:
            first[...] = scaled
            plgpu.commit_smem()
            return own
        operands = [scaled, *(plgpu.load(other, layout=TILE) for other in others)]
        plgpu.commit_smem()
        plgpu.barrier_arrive(empty.at[warpgroup])
        return operands

    def give_up(self, barriers, warpgroup) -> None:
        """Frees the buffers of a warpgroup whose operands are not resident."""
        if not self.tiles.resident:
            plgpu.barrier_arrive(barriers[1].at[warpgroup])

    def each(self, program, compute: Callable, passing) -> None:
        """`step = compute(i, step)`, in a consumer warpgroup, for each tile of the program; steps are the ring's."""
        passing.ring.release(self.schedule.each(program, compute, jnp.int32(0)) - 1)
        plgpu.wait_smem_to_gmem(0)
