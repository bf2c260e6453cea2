"""Tile sizes of the quadratic kernels, and which are used where."""

import dataclasses
from typing import Any

from pallas_kernels.quadratic.operands import Problem
from pallas_kernels.schedule import Schedule
from pallas_kernels.triton.device import like
from pallas_kernels.triton.quadratic.table import TABLE


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one kernel cuts the problem.

    Attributes:
      own: rows of the tile that a program owns (queries; in the keys' kernel, keys).
      streamed: rows of the tiles that pass by (keys; in the keys' kernel, queries); divides `own`.
      warps: of a program.
      num_stages: streamed tiles that are in flight or in use at a time.
    """

    own: int
    streamed: int
    warps: int
    num_stages: int

    def __post_init__(self):
        if self.streamed < 16 or self.own % self.streamed or any(x & (x - 1) for x in (self.own, self.streamed)):
            raise ValueError(f"{self.own=} and {self.streamed=} must be powers of two from 16, the latter no larger")
        if self.warps not in (4, 8):
            raise ValueError(f"{self.warps=} must be 4 or 8")
        if self.num_stages < 1:
            raise ValueError(f"{self.num_stages=} must be at least 1")

    def constants(self, problem: Problem) -> dict[str, Any]:
        """What is compiled into a kernel, as its keywords; and the launch options."""
        return {
            "SCORE": problem.score,
            "NORMALIZE": problem.normalize,
            "SCORE_SCALE": problem.query_power ** (2 if problem.score == "squared" else 1),
            "LOGIT_SCALE": problem.logit_scale,
            "OUTPUT_SCALE": problem.output_scale,
            "TOKENS": problem.tokens,
            "HEADS": problem.heads,
            "KV_HEADS": problem.kv_heads,
            "DIM": problem.head_dim,
            "OWN": self.own,
            "STREAMED": self.streamed,
            "num_warps": self.warps,
            "num_stages": self.num_stages,
        }


def programs_of(heads: int, tiles: int, bytes_per_head: int) -> tuple[tuple[int], int]:
    """The grid, and how many heads are taken at a time, for `pieces.piece`.

    Args:
      heads: of all batch entries.
      tiles: per head.
      bytes_per_head: that the programs of one head stream.
    """
    group = Schedule.make(heads, tiles, bytes_per_head, heads * tiles, ascending=True).group
    return (heads * tiles,), group


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The tiles of the three kernels."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


def tuning(capability: int, score: str, head_dim: int) -> Tuning:
    """The table's entries for a compute capability (as 90 for 9.0), score and head dim."""
    architecture = like(capability)
    names = (field.name for field in dataclasses.fields(Tuning))
    return Tuning(**{name: Tiles(**TABLE[name, architecture, score, head_dim]) for name in names})
