"""The rows that `linear_query` and `linear_gradient` take past a state: 64 to a program of one warpgroup.

What a program loads fits several times into a multiprocessor, so that some programs load while others compute.
"""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, load_vector
from pallas_kernels.chunked.problem import Problem, split_index

ROWS = 64


def programs_of(problem: Problem) -> int:
    """How many programs a call takes."""
    return problem.batch * problem.heads * (problem.tokens // ROWS)


@dataclasses.dataclass(frozen=True)
class Place:
    """The rows of a program: their batch entry, head, group, chunk, and tokens."""

    b: Any
    h: Any
    g: Any
    c: Any
    rows: Any

    @staticmethod
    def of(problem: Problem, program) -> "Place":
        """Those of the program with this number; heads of a token, which are beside each other, follow each other."""
        tiles = problem.tokens // ROWS
        at, h = split_index(program, problem.heads)
        b, tile = split_index(at, tiles)
        rows = pl.ds(tile * ROWS, ROWS)
        return Place(b, h, lax.div(h, problem.repeats), lax.div(tile, problem.chunk // ROWS), rows)

    def load(self, tiles, state_ref, state_s, full) -> None:
        """Waits for the rows of (array [B, T, H, dim], buffer) pairs and for the state [B, G, N, K, V] of the chunk."""
        for source_ref, to in tiles:
            plgpu.copy_gmem_to_smem(source_ref.at[self.b, self.rows, self.h], to, full)
        plgpu.copy_gmem_to_smem(state_ref.at[self.b, self.g, self.c], state_s, full)
        plgpu.barrier_wait(full)

    def vector(self, ref, head):
        """The rows' entries of [B, heads, T]."""
        return load_vector(ref.at[self.b, head, self.rows])

    def of_chunk(self, ref):
        """The chunk's entries of [B, G, N, K], as one per column."""
        return load_vector(ref.at[self.b, self.g, self.c], COLUMN)

    def store(self, tile, buffer, ref) -> None:
        """Writes a tile to [B, T, H, dim] in bfloat16, by way of a buffer."""
        buffer[...] = tile.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, ref.at[self.b, self.rows, self.h])
        plgpu.wait_smem_to_gmem(0)
