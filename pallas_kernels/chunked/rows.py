"""The rows that `query` and `gradient` take past a state, 64 `halves` to each consumer warpgroup of a program."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.accumulator import TILE, Scratch, load_vector
from pallas_kernels.chunked.layout import HEAD_DIM
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.launch import Refs, Roles
from pallas_kernels.ring import Handover, Ring
from pallas_kernels.schedule import each_piece

CONSUMERS = 2
ROLES = Roles(CONSUMERS, consumer_registers=232, producer_registers=40)


class Piece(NamedTuple):
    """A piece of work: some rows of one head and chunk.

    b: batch entry; g: group; c: chunk; h: head; start: first row.
    """

    b: jax.Array
    g: jax.Array
    c: jax.Array
    h: jax.Array
    start: jax.Array

    @property
    def state(self) -> tuple:
        """The index of the state that its rows pass."""
        return self.b, self.g, self.c


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

    def piece(self, program, i) -> Piece:
        """The program's i-th piece."""
        p = self.problem
        at, tile = split_index(program + i * self.programs, self._tiles)
        at, r = split_index(at, p.repeats)
        at, c = split_index(at, p.chunks)
        b, g = split_index(at, p.groups)
        return Piece(b, g, c, g * p.repeats + r, c * p.chunk + tile * p.tiles.rows)

    def of(self, start, warpgroup, half) -> pl.Slice:
        """64 rows of a warpgroup, in a piece that begins at `start`."""
        return pl.ds(start + (warpgroup * self.problem.tiles.halves + half) * HEAD_DIM, HEAD_DIM)

    def ring(self, barriers) -> Ring:
        """The ring of buffers for tiles of a state."""
        return Ring(self.problem.tiles.state_stages, *barriers)

    def handover(self, arrays: int) -> Handover:
        """The barriers of buffers for the rows of so many arrays."""
        return Handover.barriers(CONSUMERS, arrays * self.problem.tiles.halves)

    def load(self, program, i, sources, handover: Handover) -> None:
        """Loads the rows of all (array [B, T, H, 64], buffer [CONSUMERS, halves, 64, 64]) for every warpgroup."""
        b, _, _, h, start = self.piece(program, i)
        for w in range(CONSUMERS):
            handover.claim(w, i)
            for array, buffer in sources:
                for half in range(self.problem.tiles.halves):
                    rows = array.at[b, self.of(start, w, half), h]
                    plgpu.copy_gmem_to_smem(rows, buffer.at[w, half], handover.full.at[w])

    def load_each(self, program, load: Callable, ring: Ring, handovers: Sequence[Handover]) -> None:
        """`step = load(i, step)`, in the producer warpgroup, for each piece of the program; steps are the ring's."""
        ring.drain(each_piece(self.work, self.programs, program, load, jnp.int32(0)))
        for w in range(CONSUMERS):
            for handover in handovers:
                handover.drain(w)

    def compute_each(self, program, compute: Callable) -> None:
        """`step = compute(i, step)`, in a consumer warpgroup, for each piece of the program; steps are the ring's."""
        each_piece(self.work, self.programs, program, compute, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


class Share(NamedTuple):
    """What a consumer warpgroup has of a piece of work.

    own: the pieces of the call; refs: of the kernel; memory: of the warpgroup; at: the piece; warpgroup: its number.
    """

    own: Rows
    refs: Refs
    memory: Scratch
    at: Piece
    warpgroup: Any

    @property
    def halves(self) -> range:
        """The numbers of its halves, of 64 rows each."""
        return range(self.own.problem.tiles.halves)

    @property
    def ring(self) -> Ring:
        """The ring of tiles of the state."""
        return self.own.ring(self.refs.scratch.ring)

    def rows(self, half: int) -> pl.Slice:
        """The rows of a half, as an index."""
        return self.own.of(self.at.start, self.warpgroup, half)

    def load(self, buffer, half: int):
        """The rows of a half, from a buffer [CONSUMERS, halves, 64, 64]."""
        return plgpu.load(buffer.at[self.warpgroup, half], layout=TILE)

    def feature(self, half: int, a):
        """Feature a of each row of a half [64], from the scratch `x_rows` [CONSUMERS, halves, features, rows]."""
        return load_vector(self.refs.scratch.x_rows.at[self.warpgroup, half, a])

    def accumulate(self, body: Callable):
        """`body(*accumulators)` with a zeroed accumulator [64, 64] for each half."""
        return self.memory.accumulate(body, *[(HEAD_DIM, HEAD_DIM)] * len(self.halves))

    def store(self, buffer, array, handover: Handover) -> None:
        """Writes all its rows from their buffer, and releases it."""
        b, _, _, h, _ = self.at
        plgpu.commit_smem()
        for half in self.halves:
            plgpu.copy_smem_to_gmem(buffer.at[self.warpgroup, half], array.at[b, self.rows(half), h])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        handover.release(self.warpgroup)
