"""The tokens that `linear_update` and `normalizer` sum over: of a chunk and all heads of a group, 64 at a time.

They go through a ring of buffers, which the one warpgroup of a program fills and empties.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.chunked.problem import Problem, split_index

SIZE = 64  # tokens at a time
STAGES = 4


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The steps of a program over its tokens."""

    problem: Problem

    @property
    def _blocks(self) -> int:
        return self.problem.chunk // SIZE

    @property
    def steps(self) -> int:
        """How many."""
        return self.problem.repeats * self._blocks

    @property
    def stages(self) -> int:
        """How many buffers, which the steps take in turn."""
        return min(STAGES, self.steps)

    def slot(self, n):
        """The buffer of the n-th step."""
        return lax.rem(n, self.stages)

    def of(self, g, c, n):
        """The head and the tokens of the n-th step in chunk c of group g."""
        r, block = split_index(n, self._blocks)
        return g * self.problem.repeats + r, pl.ds(c * self.problem.chunk + block * SIZE, SIZE)

    def each(self, full, add: Callable, fill: Callable, carry: Any):
        """`carry = add(slot, carry)` for each step, of tokens in a buffer; the last carry.

        `fill(n)` loads the tokens of the n-th step, to complete a barrier of `full`; it was called for the first steps.
        """

        def step(n, carry):
            slot = self.slot(n)
            plgpu.barrier_wait(full.at[slot])
            carry = add(slot, carry)
            plgpu.commit_smem()
            pl.when(n + self.stages < self.steps)(lambda: fill(n + self.stages))
            return carry

        return lax.fori_loop(0, self.steps, step, carry)
