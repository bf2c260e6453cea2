"""Keys and values on their way past a tile of queries: the order, the loads, and who sees whom.

The forward kernel and the kernel of the queries' gradient share it. A tile of block_q rows first sees the keys before
it, nearest first, whose decay is a factor per row times a factor per column; then the keys at its own positions
("beside"), whose decay is computed for each pair.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, ROW, columns, load_rows, operand, positions, rows, store_rows
from pallas_kernels.launch import Refs
from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.quadratic.tuning import Tiles
from pallas_kernels.ring import Ring

ROWS = 64  # query rows of one warpgroup


class KeyTiles(NamedTuple):
    """Numbers of key tiles that a query tile sees.

    whole: before the query tile, and seen by all of its rows; before: before it, seen by some row; beside: at its own
    positions.
    """

    whole: jax.Array
    before: jax.Array
    beside: jax.Array


class KeyBuffers(NamedTuple):
    """Shared memory of the ring: keys, values, the decay of each key, and the ring's barriers."""

    k: Any
    v: Any
    decay: Any
    barriers: Any

    @staticmethod
    def types(problem: Problem, block_kv: int, num_stages: int, has_decay: bool, users: int) -> "KeyBuffers":
        """What to allocate."""
        tile = operand((num_stages, block_kv, problem.head_dim))
        barriers = Ring.barriers(num_stages, arrivals=2 + has_decay, users=users)
        return KeyBuffers(tile, tile, plgpu.SMEM((num_stages, block_kv), jnp.float32), barriers)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys, values and decays of a call, as seen by query tiles of block_q rows.

    Attributes:
      problem: the call.
      block_q: rows of a query tile, and tokens of a chunk of `decay`.
      block_kv: keys of a key tile; divides block_q.
      k, v: [B, T, G, K] in device memory.
      decay: in device memory, or None.
      first_visible: [B, T padded to block_q] int32, the first key that each row sees; None without segments.
      buffers: the ring's shared memory.
    """

    problem: Problem
    block_q: int
    block_kv: int
    num_stages: int
    k: Any
    v: Any
    decay: Decay | None
    first_visible: Any
    buffers: KeyBuffers

    @staticmethod
    def of(problem: Problem, tiles: Tiles, refs: Refs) -> "Keys":
        """Those of a kernel's references, for query tiles of `tiles.own` rows."""
        inputs = refs.inputs
        kv = inputs.k, inputs.v, inputs.decay, inputs.first_visible
        return Keys(problem, tiles.own, tiles.streamed, tiles.num_stages, *kv, refs.scratch.keys)

    @property
    def ring(self) -> Ring:
        """The ring of buffers."""
        return Ring(self.num_stages, *self.buffers.barriers)

    def seen(self, b, start) -> KeyTiles:
        """How many key tiles the query tile from row `start` of batch entry b sees."""
        before = lax.div(start, self.block_kv)
        to_the_end = lax.div(self.problem.tokens - start + self.block_kv - 1, self.block_kv)
        beside = lax.min(jnp.int32(self.block_q // self.block_kv), to_the_end)
        if self.first_visible is None:
            return KeyTiles(before, before, beside)
        first, last = self.first_visible[b, start], self.first_visible[b, start + self.block_q - 1]
        whole = lax.max(before - lax.div(last + self.block_kv - 1, self.block_kv), 0)
        return KeyTiles(whole, before - lax.div(first, self.block_kv), beside)

    def load(self, step, b, g, start):
        """Fills the ring with everything the query tile sees; the next step."""
        seen = self.seen(b, start)

        def before(n):
            return start - (n + 1) * self.block_kv

        def beside(n):
            return start + n * self.block_kv

        if self.decay is None:

            def fill(place):
                def tile(n, step):
                    self._fill(step, b, g, place(n), None)
                    return step + 1

                return tile

            step = lax.fori_loop(0, seen.before, fill(before), step)
            return lax.fori_loop(0, seen.beside, fill(beside), step)

        def load_suffix(n):
            """The decays of a tile's keys, of some tile at least."""
            return load_rows(self.decay.suffix.at[b, g], lax.max(before(n), 0), self.block_kv)

        def tile_before(n, carry):
            step, between, total, suffix = carry
            # What is loaded here is used in the next turn: a load that is waited for would hold up the copies.
            upcoming = load_suffix(n + 1)
            at = before(n)
            entered_chunk = (n > 0) & (lax.rem(at + self.block_kv, self.block_q) == 0)
            between = between + jnp.where(entered_chunk, total, 0.0)
            total = self.decay.total[b, g, lax.div(at, self.block_q)]
            decay = tuple(x + between for x in suffix)
            if self.problem.score != "exp":
                decay = tuple(jnp.exp2(x) for x in decay)
            self._fill(step, b, g, at, decay)
            return step + 1, between, total, upcoming

        def tile_beside(n, step):
            prefix = load_rows(self.decay.prefix.at[b, g], beside(n), self.block_kv)
            self._fill(step, b, g, beside(n), tuple(-x for x in prefix))
            return step + 1

        carry = (step, jnp.float32(0), jnp.float32(0), load_suffix(0))
        step = lax.fori_loop(0, seen.before, tile_before, carry)[0]
        return lax.fori_loop(0, seen.beside, tile_beside, step)

    def _fill(self, step, b, g, at, decay) -> None:
        slot, tile = self.ring.claim(step), pl.ds(at, self.block_kv)
        full = self.ring.full.at[slot]
        plgpu.copy_gmem_to_smem(self.k.at[b, tile, g], self.buffers.k.at[slot], full)
        plgpu.copy_gmem_to_smem(self.v.at[b, tile, g], self.buffers.v.at[slot], full)
        if decay is not None:
            store_rows(self.buffers.decay.at[slot], decay)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)

    def walk(self, step, b, start, first_row, tile, turn, carry):
        """Takes 64 rows from `first_row` past the keys that their query tile sees.

        Args:
          step: of the ring.
          b: batch entry.
          start: first row of the query tile.
          first_row: of this warpgroup.
          tile: `tile(slot, release, decays_of, mask_of, beside, carry) -> carry` for each key tile, of whose keys
            `decays_of(part, size)` and `mask_of(part, size)` give a slice, spread over 64 rows. A decay is a factor
            before the query tile (exp: its logarithm), and minus its prefix beside it; None without. mask_of is None
            where the rows see all. `release()` is called once every product of the tile before has been awaited.
          turn: `turn(carry) -> carry`, between the keys before and those beside.
          carry: a tuple.

        Returns:
          The next step, and the carry. The last buffer is released in the next walk; the very last is for the caller.
        """
        seen = self.seen(b, start)

        def visit(n, carry, beside, segments):
            this, inner = carry
            slot = self.ring.receive(this)
            at = start + n * self.block_kv if beside else start - (n + 1) * self.block_kv

            def release():
                @pl.when(this > 0)
                def _():
                    self.ring.release(this - 1)

            def decays_of(part, size):
                if self.decay is None:
                    return None
                decay = plgpu.load(self.buffers.decay.at[slot, part], layout=COLUMN, optimized=False)
                return columns(decay, (ROWS, size))

            def mask_of(part, size):
                return self._mask(b, at + part.start, size, first_row, segments)

            masked = beside or segments
            return this + 1, tile(slot, release, decays_of, mask_of if masked else None, beside, inner)

        def loop(begin, end, carry, **kind):
            return lax.fori_loop(begin, end, lambda n, carry: visit(n, carry, **kind), carry)

        segments = self.first_visible is not None
        carry = loop(0, seen.whole, (step, carry), beside=False, segments=False)
        if segments:
            carry = loop(seen.whole, seen.before, carry, beside=False, segments=True)
        carry = (carry[0], turn(carry[1]))
        return loop(0, seen.beside, carry, beside=True, segments=segments)

    def _mask(self, b, at, size, first_row, segments):
        """Which keys from `at` on the rows see: 0 <= row - key, and with segments <= row - first_visible."""
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + first_row
        row_at, key = positions(row - at, size)
        if not segments:
            return row_at >= key
        first = plgpu.load(self.first_visible.at[b, pl.ds(first_row, ROWS)], layout=ROW, optimized=False)
        # As unsigned numbers, negative distances are the largest.
        return (row_at - key).astype(jnp.uint32) <= rows((row - first).astype(jnp.uint32), (ROWS, size))
