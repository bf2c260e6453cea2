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
from pallas_kernels.ring import Handover
from pallas_kernels.schedule import Schedule


class Rows(NamedTuple):
    """Where the rows of a warpgroup are.

    b: batch entry; h: head; g: key/value head; start: first row of their tile; first: of themselves; warpgroup: its
    number.
    """

    b: jax.Array
    h: jax.Array
    g: jax.Array
    start: jax.Array
    first: jax.Array
    warpgroup: jax.Array

    @staticmethod
    def of(tile, warpgroup) -> "Rows":
        """Those of a warpgroup in a tile (b, h, g, start)."""
        return Rows(*tile, tile[-1] + warpgroup * ROWS, warpgroup)

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

    def tile(self, program, i):
        """(b, h, g, start) of the program's i-th tile, as in `Rows`."""
        head, tile = self.schedule.tile(program, i)
        b, h = lax.div(head, self.heads), lax.rem(head, self.heads)
        repeats = self.heads // self.problem.kv_heads
        return b, h, h if repeats == 1 else lax.div(h, repeats), tile * self.tiles.own

    def handover(self, operands: int) -> Handover:
        """The barriers of buffers for so many operands."""
        return Handover.barriers(self.tiles.consumers, operands)

    def load(self, program, operands: Sequence[tuple[Any, Any]], handover: Handover, passing) -> None:
        """Loads, in the producer warpgroup, the operands of all tiles of a program, and what passes them.

        Args:
          program: its number.
          operands: (array [B, T, heads, K], buffer [consumers, 64, K]) of each.
          handover: of the buffers.
          passing: the `Keys` or `Queries`.
        """

        def load_tile(i, step):
            b, h, g, start = self.tile(program, i)
            for w in range(self.tiles.consumers):
                handover.claim(w, i)
                rows = pl.ds(start + w * ROWS, ROWS)
                for array, buffer in operands:
                    plgpu.copy_gmem_to_smem(array.at[b, rows, h], buffer.at[w], handover.full.at[w])
            return passing.load(step, b, g, start)

        passing.ring.drain(self.schedule.each(program, load_tile, jnp.int32(0)))
        for w in range(self.tiles.consumers):
            handover.drain(w)

    def take(self, buffers: Sequence[Any], handover: Handover, warpgroup, power: float):
        """The operands of a warpgroup's products, the first times `power`: in registers if resident, or in the buffers.

        What stays in the buffers is to be given up by `give_up`.
        """
        own = [buffer.at[warpgroup] for buffer in buffers]
        handover.receive(warpgroup)
        scaled = plgpu.load(own[0], layout=TILE) * power
        if not self.tiles.resident:
            own[0][...] = scaled
            plgpu.commit_smem()
            return own
        operands = [scaled, *(plgpu.load(other, layout=TILE) for other in own[1:])]
        plgpu.commit_smem()
        handover.release(warpgroup)
        return operands

    def give_up(self, handover: Handover, warpgroup) -> None:
        """Releases the buffers of operands that are not resident."""
        if not self.tiles.resident:
            handover.release(warpgroup)

    def each(self, program, compute: Callable, passing) -> None:
        """`step = compute(i, step)`, in a consumer warpgroup, for each tile of the program; steps are the ring's."""
        passing.ring.release(self.schedule.each(program, compute, jnp.int32(0)) - 1)
        plgpu.wait_smem_to_gmem(0)
