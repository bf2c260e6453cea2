"""Which program computes which tile, and in what order: a fixed number of programs, each with every n-th tile."""

import dataclasses

from jax import lax

# Bytes of keys and values that the programs running at one time may stream: well below the 50 MB of a Hopper L2.
CACHED_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tiles of `heads` (batch entries times heads) and `tiles` per head, the most expensive first.

    Heads are taken in groups, all of a group's tiles before the next group's, so that the keys and values that are
    read at any one time stay in the cache.

    Attributes:
      heads: B * H.
      tiles: tiles per head; tile i costs about i if `ascending`, `tiles` - i otherwise.
      group: heads per group.
      programs: how many programs share the work.
      ascending: whether the last tile of a head is the most expensive.
    """

    heads: int
    tiles: int
    group: int
    programs: int
    ascending: bool

    @staticmethod
    def make(heads: int, tiles: int, bytes_per_head: int, programs: int, ascending: bool) -> "Schedule":
        """The largest groups that fit the cache; no more programs than tiles."""
        limit = max(1, min(heads, CACHED_BYTES // bytes_per_head))
        group = max(size for size in range(1, limit + 1) if heads % size == 0)
        return Schedule(heads, tiles, group, min(programs, heads * tiles), ascending)

    def count(self, program):
        """How many tiles the program computes."""
        return lax.div(self.heads * self.tiles - program + self.programs - 1, self.programs)

    def tile(self, program, i):
        """(head, tile) of the program's i-th piece of work."""
        work = program + i * self.programs
        in_group = lax.rem(work, self.group * self.tiles)
        head = lax.div(work, self.group * self.tiles) * self.group + lax.rem(in_group, self.group)
        tile = lax.div(in_group, self.group)
        return head, self.tiles - 1 - tile if self.ascending else tile
