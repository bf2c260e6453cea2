"""What the chunked kernels are told of a call: its sizes."""

import dataclasses

from jax import lax

from pallas_kernels.device import multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernels cut a chunk, and how many programs share the work.

    Attributes:
      tokens: that the update takes at a time, a multiple of 64; divides a chunk.
      update_stages: of its ring.
      states: tiles of the state that the other kernels take at a time, 2, 4 or 8.
      state_stages: of their ring.
      halves: 64 rows each, that a warpgroup of these kernels owns.
      programs: how many programs share the work; None: one for each multiprocessor.

    Raises:
      ValueError: tokens that are no multiple of 64.
    """

    tokens: int = 64
    update_stages: int = 5
    states: int = 4
    state_stages: int = 3
    halves: int = 2
    programs: int | None = None

    def __post_init__(self):
        if self.tokens % 64:
            raise ValueError(f"tokens={self.tokens} must be a multiple of 64")

    @property
    def rows(self) -> int:
        """Rows of a program of those kernels: a chunk has a multiple of them, and of 128."""
        return 2 * 64 * self.halves

    def programs_of(self, work: int) -> int:
        """How many programs share so many pieces of work."""
        return min(self.programs or multiprocessors(), work)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, apart from its arrays: N chunks of C tokens, H heads in G groups that share a state.

    `tiles` is None where the kernels find theirs by themselves.
    """

    batch: int
    tokens: int
    heads: int
    groups: int
    chunk: int
    tiles: Tiles | None
    interpret: bool

    @property
    def chunks(self) -> int:
        """N."""
        return self.tokens // self.chunk

    @property
    def repeats(self) -> int:
        """Heads per group."""
        return self.heads // self.groups


def split_index(index, size: int):
    """(index // size, index % size), of a number that is not negative."""
    return lax.div(index, size), lax.rem(index, size)
