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

from pallas_kernels import accumulator
from pallas_kernels.accumulator import COLUMN, ROW, columns, load_rows, load_vector, rows
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
    def types(own: OwnTiles, has_decay: bool) -> "KeyBuffers":
        """What to allocate."""
        size, stages = own.tiles.streamed, own.tiles.num_stages
        tile = accumulator.operand((stages, size, own.problem.head_dim))
        barriers = Ring.barriers(stages, arrivals=2 + has_decay, users=own.tiles.consumers)
        return KeyBuffers(tile, tile, plgpu.SMEM((stages, size), jnp.float32), barriers)


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys, values and decays of a call, as seen by query tiles of block_q rows.

    Attributes:
      own: the query tiles; block_q, tokens of a chunk of the decays too, is `own.tiles.own`, and block_kv, the keys of
        a key tile, is `own.tiles.streamed`.
      inputs: in device memory, k, v [B, T, G, K]; decay, or None; and first_visible [B, T padded to block_q] int32, the
        first key that each row sees, None without segments.
      buffers: the ring's shared memory.
    """

    own: OwnTiles
    inputs: Any
    buffers: KeyBuffers

    @property
    def ring(self) -> Ring:
        """The ring of buffers."""
        return Ring(self.own.tiles.num_stages, *self.buffers.barriers)

    @property
    def block_q(self) -> int:
        """Rows of a query tile."""
        return self.own.tiles.own

    @property
    def block_kv(self) -> int:
        """Keys of a key tile."""
        return self.own.tiles.streamed

    def seen(self, b, start) -> Counts:
        """How many key tiles the query tile from row `start` of batch entry b sees."""
        before = lax.div(start, self.block_kv)
        to_the_end = lax.div(self.own.problem.tokens - start + self.block_kv - 1, self.block_kv)
        beside = lax.min(jnp.int32(self.block_q // self.block_kv), to_the_end)
        if self.inputs.first_visible is None:
            return Counts(before, before, beside)
        first, last = self.inputs.first_visible[b, start], self.inputs.first_visible[b, start + self.block_q - 1]
        whole = lax.max(before - lax.div(last + self.block_kv - 1, self.block_kv), 0)
        return Counts(whole, before - lax.div(first, self.block_kv), beside)

    def load(self, step, b, g, start):
        """Fills the ring with everything the query tile sees; the next step."""
        seen = self.seen(b, start)

        def before(n):
            return start - (n + 1) * self.block_kv

        def beside(n):
            return start + n * self.block_kv

        if self.inputs.decay is None:
            step = lax.fori_loop(0, seen.before, lambda n, step: self._fill(step, b, g, before(n), None), step)
            return lax.fori_loop(0, seen.beside, lambda n, step: self._fill(step, b, g, beside(n), None), step)

        def load_suffix(n):
            """The decays of a tile's keys, of some tile at least."""
            return load_rows(self.inputs.decay.suffix.at[b, g], lax.max(before(n), 0), self.block_kv)

        def tile_before(n, carry):
            step, between, total, suffix = carry
            # What is loaded here is used in the next turn: a load that is waited for would hold up the copies.
            upcoming = load_suffix(n + 1)
            at = before(n)
            entered_chunk = (n > 0) & (lax.rem(at + self.block_kv, self.block_q) == 0)
            between = between + jnp.where(entered_chunk, total, 0.0)
            total = self.inputs.decay.total[b, g, lax.div(at, self.block_q)]
            decay = tuple(x + between for x in suffix)
            if self.own.problem.score != "exp":
                decay = tuple(jnp.exp2(x) for x in decay)
            return self._fill(step, b, g, at, decay), between, total, upcoming

        def tile_beside(n, step):
            prefix = load_rows(self.inputs.decay.prefix.at[b, g], beside(n), self.block_kv)
            return self._fill(step, b, g, beside(n), tuple(-x for x in prefix))

        carry = (step, jnp.float32(0), jnp.float32(0), load_suffix(0))
        step = lax.fori_loop(0, seen.before, tile_before, carry)[0]
        return lax.fori_loop(0, seen.beside, tile_beside, step)

    def _fill(self, step, b, g, at, decay):
        slot, tile = self.ring.claim(step), pl.ds(at, self.block_kv)
        full = self.ring.full.at[slot]
        plgpu.copy_gmem_to_smem(self.inputs.k.at[b, tile, g], self.buffers.k.at[slot], full)
        plgpu.copy_gmem_to_smem(self.inputs.v.at[b, tile, g], self.buffers.v.at[slot], full)
        if decay is not None:
            accumulator.store_rows(self.buffers.decay.at[slot], decay)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)
        return step + 1

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
        seen, segments = self.seen(at.b, at.start), self.inputs.first_visible is not None

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
        pl.when(self.step > 0)(lambda: self.call.ring.release(self.step - 1))

    def decays(self, part: pl.Slice):
        """The decays of a slice's keys for every row, [64, size]; None without.

        They are factors before the query tile (exp: logarithms of them), and minus the keys' prefixes beside it.
        """
        if self.call.inputs.decay is None:
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
        row_at, key = accumulator.positions(row - start, part.size)
        if not self.segments:
            return row_at >= key
        first = load_vector(self.call.inputs.first_visible.at[self.rows.b, self.rows.slice])
        # As unsigned numbers, negative distances are the largest.
        return (row_at - key).astype(jnp.uint32) <= rows((row - first).astype(jnp.uint32), (ROWS, part.size))
