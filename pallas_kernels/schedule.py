"""Which program computes which tile, and in what order: a fixed number of programs, each with every n-th tile."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import anew

# Bytes of keys and values that the programs running at one time may stream: well below the 50 MB of a Hopper L2.
CACHED_BYTES = 16 << 20


def each_piece(work: int, programs: int, program, body, carry):
    """`carry = body(i, carry)` for each of the program's pieces of work, program + i programs; the last carry."""

    def more(state):
        return anew(program) + state[0] * programs < work

    return lax.while_loop(more, lambda state: (state[0] + 1, body(*state)), (jnp.int32(0), carry))[1]


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

    def each(self, program, body, carry):
        """`carry = body(i, carry)` for each tile of the program; the last carry."""
        return each_piece(self.heads * self.tiles, self.programs, program, body, carry)

    def tile(self, program, i):
        """(head, tile) of the program's i-th piece of work."""
        work = program + i * self.programs
        in_group = lax.rem(work, self.group * self.tiles)
        head = lax.div(work, self.group * self.tiles) * self.group + lax.rem(in_group, self.group)
        tile = lax.div(in_group, self.group)
        return head, self.tiles - 1 - tile if self.ascending else tile
