"""Keys and values on their way past a tile of queries: the order, the loads, and who sees whom.

The forward kernel and the kernel of the queries' gradient share it. A tile of block_q rows first sees the keys before
it, nearest first, whose decay is a factor per row times a factor per column; then the keys at its own positions
("beside"), whose decay is computed for each pair.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import (
    COLUMN,
    ROW,
    columns,
    load_rows,
    load_vector,
    operand,
    positions,
    rows,
    store_rows,
)
from pallas_kernels.launch import Refs
from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.quadratic.own import OwnTiles, Rows
from pallas_kernels.quadratic.tuning import ROWS
from pallas_kernels.ring import Ring


class Counts(NamedTuple):
    """How many key tiles a query tile sees.

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
    def of(own: OwnTiles, refs: Refs) -> "Keys":
        """Those of a kernel's references, as seen by the tiles that its programs own."""
        tiles, inputs = own.tiles, refs.inputs
        kv = inputs.k, inputs.v, inputs.decay, inputs.first_visible
        return Keys(own.problem, tiles.own, tiles.streamed, tiles.num_stages, *kv, refs.scratch.keys)

    @property
    def ring(self) -> Ring:
        """The ring of buffers."""
        return Ring(self.num_stages, *self.buffers.barriers)

    def seen(self, b, start) -> Counts:
        """How many key tiles the query tile from row `start` of batch entry b sees."""
        before = lax.div(start, self.block_kv)
        to_the_end = lax.div(self.problem.tokens - start + self.block_kv - 1, self.block_kv)
        beside = lax.min(jnp.int32(self.block_q // self.block_kv), to_the_end)
        if self.first_visible is None:
            return Counts(before, before, beside)
        first, last = self.first_visible[b, start], self.first_visible[b, start + self.block_q - 1]
        whole = lax.max(before - lax.div(last + self.block_kv - 1, self.block_kv), 0)
        return Counts(whole, before - lax.div(first, self.block_kv), beside)

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

    def walk(self, step, at: Rows, tile: Callable, turn: Callable, carry: Any):
        """Takes the rows of a warpgroup past the keys that their query tile sees.

        Args:
          step: of the ring.
          at: where the rows are.
          tile: `carry = tile(keys, carry)` for each `KeyTile`.
          turn: `carry = turn(carry)`, between the keys before and those beside.
          carry: a pytree.

        Returns:
          The next step, and the carry. The last buffer is released in the next walk; the very last is for the caller.
        """
        seen, segments = self.seen(at.b, at.start), self.first_visible is not None

        def visit(n, state, beside, segments):
            step, carry = state
            slot = self.ring.receive(step)
            start = at.start + n * self.block_kv if beside else at.start - (n + 1) * self.block_kv
            return step + 1, tile(KeyTile(self, at, step, slot, start, beside, segments), carry)

        def loop(begin, end, state, **kind):
            return lax.fori_loop(begin, end, lambda n, state: visit(n, state, **kind), state)

        state = loop(0, seen.whole, (step, carry), beside=False, segments=False)
        if segments:
            state = loop(seen.whole, seen.before, state, beside=False, segments=True)
        state = state[0], turn(state[1])
        return loop(0, seen.beside, state, beside=True, segments=segments)


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """A tile of keys in the ring, as 64 rows of queries see it.

    Attributes:
      call: the keys of the call.
      rows: where the queries are.
      step: of the ring.
      slot: its buffer.
      start: its first key.
      beside: whether it is at the query tile's own positions.
      segments: whether some row may not see some key because of its segment.
    """

    call: Keys
    rows: Rows
    step: jax.Array
    slot: jax.Array
    start: jax.Array
    beside: bool
    segments: bool

    def k(self, part: pl.Slice):
        """The keys of a slice of the tile, [size, K]."""
        return self.call.buffers.k.at[self.slot, part]

    def v(self, part: pl.Slice):
        """The values of a slice, [size, V]."""
        return self.call.buffers.v.at[self.slot, part]

    def release(self) -> None:
        """Frees the buffer of the tile before: to be called once, when all of its products have been awaited."""

        @pl.when(self.step > 0)
        def _():
            self.call.ring.release(self.step - 1)

    def decays(self, part: pl.Slice):
        """The decays of a slice's keys for every row, [64, size]; None without.

        They are factors before the query tile (exp: logarithms of them), and minus the keys' prefixes beside it.
        """
        if self.call.decay is None:
            return None
        return columns(load_vector(self.call.buffers.decay.at[self.slot, part], COLUMN), (ROWS, part.size))

    @property
    def masked(self) -> bool:
        """Whether some row may not see some key."""
        return self.beside or self.segments

    def mask(self, part: pl.Slice):
        """Which keys of a slice each row sees: 0 <= row - key, and with segments <= row - first_visible."""
        start = self.start + part.start
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + self.rows.first
        row_at, key = positions(row - start, part.size)
        if not self.segments:
            return row_at >= key
        first = load_vector(self.call.first_visible.at[self.rows.b, self.rows.slice])
        # As unsigned numbers, negative distances are the largest.
        return (row_at - key).astype(jnp.uint32) <= rows((row - first).astype(jnp.uint32), (ROWS, part.size))
