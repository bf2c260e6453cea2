"""The rows that `query` and `gradient` take past a state, 64 `halves` to each consumer warpgroup of a program."""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.chunked.layout import HEAD_DIM
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.launch import Roles
from pallas_kernels.ring import Handover
from pallas_kernels.schedule import each_piece

CONSUMERS = 2
ROLES = Roles(CONSUMERS, consumer_registers=232, producer_registers=40)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The pieces of work of a call; those of one state follow each other, so that the cache holds it."""

    problem: Problem

    @property
    def _tiles(self) -> int:
        return self.problem.chunk // self.problem.tiles.rows

    @property
    def work(self) -> int:
        """How many pieces."""
        p = self.problem
        return p.batch * p.heads * p.chunks * self._tiles

    @property
    def programs(self) -> int:
        """How many programs share them."""
        return self.problem.tiles.programs_of(self.work)

    def each(self, program, body, carry):
        """`carry = body(i, carry)` for each piece of the program; the last carry."""
        return each_piece(self.work, self.programs, program, body, carry)

    def place(self, program, i):
        """Batch entry, group, chunk, head and first row of the program's i-th piece."""
        p = self.problem
        at, tile = split_index(program + i * self.programs, self._tiles)
        at, r = split_index(at, p.repeats)
        at, c = split_index(at, p.chunks)
        b, g = split_index(at, p.groups)
        return b, g, c, g * p.repeats + r, c * p.chunk + tile * p.tiles.rows

    def of(self, start, warpgroup, half):
        """64 rows of a warpgroup, in a piece that begins at `start`."""
        return pl.ds(start + (warpgroup * self.problem.tiles.halves + half) * HEAD_DIM, HEAD_DIM)

    def handover(self, arrays: int) -> Handover:
        """The barriers of buffers for the rows of so many arrays."""
        return Handover.barriers(CONSUMERS, arrays * self.problem.tiles.halves)

    def load(self, program, i, sources, handover: Handover) -> None:
        """Loads the rows of all (array [B, T, H, 64], buffer [CONSUMERS, halves, 64, 64]) for every warpgroup."""
        b, _, _, h, start = self.place(program, i)
        for w in range(CONSUMERS):
            handover.claim(w, i)
            for array, buffer in sources:
                for half in range(self.problem.tiles.halves):
                    rows = array.at[b, self.of(start, w, half), h]
                    plgpu.copy_gmem_to_smem(rows, buffer.at[w, half], handover.full.at[w])

    def store(self, place, warpgroup, buffer, array, handover: Handover) -> None:
        """Writes a warpgroup's rows of a piece from their buffer, and releases it."""
        b, _, _, h, start = place
        plgpu.commit_smem()
        for half in range(self.problem.tiles.halves):
            rows = array.at[b, self.of(start, warpgroup, half), h]
            plgpu.copy_smem_to_gmem(buffer.at[warpgroup, half], rows)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        handover.release(warpgroup)
