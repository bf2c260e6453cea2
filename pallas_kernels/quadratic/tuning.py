"""Tile sizes of the quadratic kernels, and which are used where."""

import dataclasses

from pallas_kernels.launch import Roles
from pallas_kernels.quadratic.table import TABLE

ROWS = 64  # of one warpgroup


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one kernel cuts the problem.

    Attributes:
      own: rows of the tile that a program owns (queries; in the keys' kernel, keys), 64 to each consumer warpgroup.
      streamed: rows of the tiles that pass by (keys; in the keys' kernel, queries); divides `own`.
      num_stages: tiles that are in shared memory at a time.
      consumer_registers, producer_registers: per thread of a consumer, and of the producer warpgroup.
      resident: whether a warpgroup keeps its own operands in registers, or reads them from shared memory.
      part: columns of a tile of weights that are computed at a time, 32 (in the keys' kernel) or 64; None is all.
    """

    own: int
    streamed: int
    num_stages: int
    consumer_registers: int = 232
    producer_registers: int = 40
    resident: bool = True
    part: int | None = None

    def __post_init__(self):
        if self.own % ROWS or self.streamed % ROWS or self.own % self.streamed:
            raise ValueError(f"{self.own=} and {self.streamed=} must be multiples of 64, and the latter must divide")
        if self.num_stages < 2:
            raise ValueError(f"{self.num_stages=} must be at least 2: one tile is used while the next is loaded")
        if self.part not in (None, 32, 64):
            raise ValueError(f"{self.part=} must be 32 or 64")
        warpgroups = self.consumers + 1
        registers = self.consumers * self.consumer_registers + self.producer_registers
        available = 512 // warpgroups // 8 * 8 * warpgroups  # what a multiprocessor gives to each, all threads alike
        if self.consumer_registers % 8 or self.producer_registers % 8 or registers > available:
            raise ValueError(
                f"{self.consumer_registers=} and {self.producer_registers=} must be multiples of 8 and come to at most "
                f"{available} over all warpgroups; they come to {registers}"
            )

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return self.own // ROWS

    @property
    def roles(self) -> Roles:
        """Of the warpgroups of a program."""
        return Roles(self.consumers, self.consumer_registers, self.producer_registers)

    @property
    def columns(self) -> int:
        """Columns of the weights that are computed at a time."""
        return self.part or self.streamed

    @property
    def lean(self) -> bool:
        """Whether, in the keys' kernel, no product is on its way while weights are computed: registers are scarce."""
        return self.part is not None


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The tiles of the three kernels, and how many programs share the work; None: one for each multiprocessor."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    programs: int | None = None


def tuning(device_kind: str, score: str, head_dim: int, tokens: int) -> Tuning:
    """The table's entry for this device (where it has none: for an H200), score, head dim and length.

    The entry is that of the smallest bucket that holds `tokens`, or of the largest.
    """
    device = device_kind if any(key[0] == device_kind for key in TABLE) else "NVIDIA H200"
    buckets = sorted(bucket for kind, s, d, bucket in TABLE if (kind, s, d) == (device, score, head_dim))
    bucket = next((bucket for bucket in buckets if tokens <= bucket), buckets[-1])
    forward, queries, keys = TABLE[device, score, head_dim, bucket]
    return Tuning(Tiles(**forward), Tiles(**queries), Tiles(**keys))
