"""The rows that `query` and `gradient` take past a state, 64 `halves` to each consumer warpgroup of a program."""

import dataclasses

import jax.experimental.pallas as pl

from pallas_kernels.chunked.layout import HEAD_DIM
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.schedule import each_piece


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
