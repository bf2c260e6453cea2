"""Queries on their way past a tile of keys: the transpose of `keys`, for the gradients of the keys and values.

A tile of block_kv keys is first seen by the queries after it, nearest first, whose decay is a factor per query times a
factor per key; then by the queries at its own positions ("beside"), whose decay is computed for each pair. With
grouped heads the queries of all R heads pass, one head after the other.
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
    """Numbers of query tiles of one head that see a key tile.

    whole: after the key tile, and seeing all of its keys; after: after it, seeing some key; beside: at its own
    positions.
    """

    whole: jax.Array
    after: jax.Array
    beside: jax.Array


class QueryBuffers(NamedTuple):
    """Shared memory of the ring: queries, dy, the logit and delta of each query, and the ring's barriers."""

    q: Any
    dy: Any
    logit: Any
    delta: Any
    barriers: Any

    @staticmethod
    def types(own: OwnTiles, has_logit: bool, depth: int) -> "QueryBuffers":
        """What to allocate; `depth` as in `accumulator.operand`."""
        size, stages = own.tiles.streamed, own.tiles.num_stages
        tile = accumulator.operand((stages, size, own.problem.head_dim), depth)
        vector = plgpu.SMEM((stages, size), jnp.float32)
        arrivals = 2 + own.problem.normalize + has_logit
        return QueryBuffers(tile, tile, vector, vector, Ring.barriers(stages, arrivals, users=own.tiles.consumers))


@dataclasses.dataclass(frozen=True)
class Queries:
    """The queries of a call and what comes with them, as seen from key tiles of block_kv keys.

    Attributes:
      own: the key tiles; block_kv, tokens of a chunk of the decays too, is `own.tiles.own`, and block_q, the rows of a
        query tile, is `own.tiles.streamed`.
      inputs: in device memory, q, dy [B, T, H, K]; logit [B, H, T padded], what the logarithm of a weight has of the
        query, its prefix less log2 of its row's sum, None where it has neither; delta [B, H, T padded], None where
        nothing is normalised; decay, or None; and last_visible [B, T padded] int32, the last query that sees each key,
        None without segments.
      buffers: the ring's shared memory.
    """

    own: OwnTiles
    inputs: Any
    buffers: QueryBuffers

    @property
    def ring(self) -> Ring:
        """The ring of buffers."""
        return Ring(self.own.tiles.num_stages, *self.buffers.barriers)

    @property
    def block_q(self) -> int:
        """Rows of a query tile."""
        return self.own.tiles.streamed

    @property
    def block_kv(self) -> int:
        """Keys of a key tile."""
        return self.own.tiles.own

    @property
    def repeats(self) -> int:
        """Query heads per key/value head."""
        return self.own.problem.heads // self.own.problem.kv_heads

    def seeing(self, b, start) -> Counts:
        """How many query tiles of one head see the key tile from `start` of batch entry b."""
        tokens, after = self.own.problem.tokens, start + self.block_kv
        beside = self._tiles(lax.min(after, tokens) - start)
        if self.inputs.last_visible is None:
            count = self._tiles(lax.max(tokens - after, 0))
            return Counts(count, count, beside)
        first, last = self.inputs.last_visible[b, start], self.inputs.last_visible[b, after - 1]
        whole = lax.div(lax.max(first + 1 - after, 0), self.block_q)
        return Counts(whole, self._tiles(lax.max(last + 1 - after, 0)), beside)

    def _tiles(self, tokens):
        return lax.div(tokens + self.block_q - 1, self.block_q)

    def load(self, step, b, g, start):
        """Fills the ring with all queries that see the key tile; the next step."""
        seeing = self.seeing(b, start)

        def after(r, step):
            h = g * self.repeats + r
            return self._load(step, b, g, h, start + self.block_kv, seeing.after, beside=False)

        def beside(r, step):
            return self._load(step, b, g, g * self.repeats + r, start, seeing.beside, beside=True)

        return lax.fori_loop(0, self.repeats, beside, lax.fori_loop(0, self.repeats, after, step))

    def _load(self, step, b, g, h, begin, count, beside):
        def place(n):
            return begin + n * self.block_q

        if self.inputs.logit is None:
            return lax.fori_loop(0, count, lambda n, step: self._fill(step, b, h, place(n), None), step)

        has_between = self.inputs.decay is not None and not beside

        def load(n):
            """The logits of a tile's queries, of some tile at least."""
            at = lax.min(place(n), self.inputs.logit.shape[-1] - self.block_q)
            return load_rows(self.inputs.logit.at[b, h], at, self.block_q)

        def tile(n, carry):
            step, between, total, logit = carry
            # What is loaded here is used in the next turn: a load that is waited for would hold up the copies.
            upcoming = load(n + 1)
            at = place(n)
            if has_between:
                entered_chunk = (n > 0) & (lax.rem(at, self.block_kv) == 0)
                between = between + jnp.where(entered_chunk, total, 0.0)
                total = self.inputs.decay.total[b, g, lax.div(at, self.block_kv)]
                logit = tuple(x + between for x in logit)
            if self.own.problem.score != "exp" and not (beside and self.inputs.decay is not None):
                logit = tuple(jnp.exp2(x) for x in logit)
            return self._fill(step, b, h, at, logit), between, total, upcoming

        return lax.fori_loop(0, count, tile, (step, jnp.float32(0), jnp.float32(0), load(0)))[0]

    def _fill(self, step, b, h, at, logit):
        slot, tile = self.ring.claim(step), pl.ds(at, self.block_q)
        full = self.ring.full.at[slot]
        plgpu.copy_gmem_to_smem(self.inputs.q.at[b, tile, h], self.buffers.q.at[slot], full)
        plgpu.copy_gmem_to_smem(self.inputs.dy.at[b, tile, h], self.buffers.dy.at[slot], full)
        if self.inputs.delta is not None:
            plgpu.copy_gmem_to_smem(self.inputs.delta.at[b, h, tile], self.buffers.delta.at[slot], full)
        if logit is not None:
            accumulator.store_rows(self.buffers.logit.at[slot], logit)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)
        return step + 1

    def walk(self, step, place: Callable[[], Rows], tile: Callable, turn: Callable, carry: Any):
        """Takes the keys of a warpgroup past the queries that see their key tile.

        Args:
          step: of the ring.
          place: `place()` is where the keys are, computed anew at each call: registers are scarce in the loops.
          tile: `carry = tile(queries, carry)` for each `QueryTile`.
          turn: `carry = turn(carry)`, between the queries after and those beside.
          carry: a pytree.

        Returns:
          The next step, and the carry. The last buffer is released in the next walk; the very last is for the caller.
        """
        segments = self.inputs.last_visible is not None

        def visit(n, state, at, beside, segments):
            step, carry = state
            slot = self.ring.receive(step)
            start = at.start + n * self.block_q + (0 if beside else self.block_kv)
            return step + 1, tile(QueryTile(self, at, step, slot, start, beside, segments), carry)

        def loop(begin, end, state, at, **kind):
            return lax.fori_loop(begin, end, lambda n, state: visit(n, state, at, **kind), state)

        def after(_, state):
            at = place()
            seeing = self.seeing(at.b, at.start)
            state = loop(0, seeing.whole, state, at, beside=False, segments=False)
            if segments:
                state = loop(seeing.whole, seeing.after, state, at, beside=False, segments=True)
            return state

        def beside(_, state):
            at = place()
            return loop(0, self.seeing(at.b, at.start).beside, state, at, beside=True, segments=segments)

        def each_head(body, state):
            return body(0, state) if self.repeats == 1 else lax.fori_loop(0, self.repeats, body, state)

        step, carry = each_head(after, (step, carry))
        return each_head(beside, (step, turn(carry)))


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """A tile of queries in the ring, as 64 rows of keys are seen by it.

    Attributes:
      call: the queries of the call.
      rows: where the keys are.
      step: of the ring.
      slot: its buffer.
      start: its first query.
      beside: whether it is at the key tile's own positions.
      segments: whether some query may not see some key because of its segment.
    """

    call: Queries
    rows: Rows
    step: jax.Array
    slot: jax.Array
    start: jax.Array
    beside: bool
    segments: bool

    def q(self, part: pl.Slice):
        """The queries of a slice of the tile, [size, K]."""
        return self.call.buffers.q.at[self.slot, part]

    def dy(self, part: pl.Slice):
        """The gradients of a slice's outputs, [size, V]."""
        return self.call.buffers.dy.at[self.slot, part]

    def release(self) -> None:
        """Frees the buffer of the tile before: to be called once, when all of its products have been awaited."""
        pl.when(self.step > 0)(lambda: self.call.ring.release(self.step - 1))

    def columns(self, part: pl.Slice):
        """The logits, the deltas and the mask of a slice's queries for every key, [64, size] each, or None.

        A logit is a factor after the key tile (exp: its logarithm), and its logarithm beside it if there is a decay.
        """
        inputs, buffers = self.call.inputs, self.call.buffers

        def spread(ref):
            return columns(load_vector(ref.at[self.slot, part], COLUMN), (ROWS, part.size))

        logit = None if inputs.logit is None else spread(buffers.logit)
        delta = None if inputs.delta is None else spread(buffers.delta)
        return logit, delta, self._mask(part) if self.beside or self.segments else None

    def _mask(self, part: pl.Slice):
        """Which queries of a slice see the keys: 0 <= query - key, and with segments <= last_visible - key."""
        start = self.start + part.start
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + self.rows.first
        row_at, query = accumulator.positions(row - start, part.size)
        if not self.segments:
            return query >= row_at
        last = load_vector(self.call.inputs.last_visible.at[self.rows.b, self.rows.slice])
        # As unsigned numbers, negative distances are the largest.
        return (query - row_at).astype(jnp.uint32) <= rows((last - row).astype(jnp.uint32), (ROWS, part.size))
