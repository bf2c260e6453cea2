"""What each chunk adds to the state: S = sum_t phi(x_t) w_t^T, as tiles of `layout`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, TILE, Scratch, columns, load_vector, operand, read, rows
from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, KINDS, TILES, Kind
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.launch import Refs, Roles, launch_persistent
from pallas_kernels.ring import Ring
from pallas_kernels.schedule import each_piece

CONSUMERS = 2
ROLES = Roles(CONSUMERS, consumer_registers=232, producer_registers=40)
HELD = 4  # tiles of a warpgroup
PIECE = CONSUMERS * HELD  # tiles of a program at a time: all of one kind
PIECES = TILES // PIECE
SUMS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)  # of a tile in shared memory, on its way out


class Inputs(NamedTuple):
    """Arrays of the kernel; x has the features of a head before its tokens."""

    x: Any
    w: Any


class Outputs(NamedTuple):
    """What it writes."""

    s: Any


@functools.partial(jax.jit, static_argnames="problem")
def update(problem: Problem, x, w):
    """[B, G, N, 40, 64, V] float32, summed over the tokens of each of N chunks and the heads of each of G groups.

    A program takes 8 tiles of one chunk, 4 to each consumer warpgroup. The left operand of their products is x^T, its
    features in the order of the tile's rows, times the features a of every token; it is formed in registers.

    Args:
      problem: sizes; its heads are those of x and w.
      x: [B, T, H, 64] bfloat16.
      w: [B, T, H, V] bfloat16, V = 64.
    """
    p, pieces = problem, _Pieces(problem)
    block, stages, parts = p.tiles.tokens, p.tiles.update_stages, pieces.parts
    # Behind a barrier a transposition moves memory and no more: fused with what makes x, it would read that by columns.
    columns_of_x = jnp.moveaxis(lax.optimization_barrier(x), 1, 3)
    return launch_persistent(
        functools.partial(_load, pieces),
        functools.partial(_compute, pieces),
        Inputs(columns_of_x, w),
        Outputs(jax.ShapeDtypeStruct((p.batch, p.groups, p.chunks, TILES, HEAD_DIM, HEAD_DIM), jnp.float32)),
        {
            "x": operand((stages, parts, HEAD_DIM, HEAD_DIM)),
            "features": plgpu.SMEM((stages, 2, PIECE, block), jnp.bfloat16),
            "w": operand((stages, block, HEAD_DIM)),
            "s": plgpu.SMEM((CONSUMERS, HELD, HEAD_DIM, HEAD_DIM), jnp.float32, transforms=SUMS),
            "ring": Ring.barriers(stages, arrivals=1 + parts * HEAD_DIM // BLOCK + 2, users=CONSUMERS),
        },
        roles=ROLES,
        programs=pieces.programs,
        accumulators=Scratch.types(p.interpret, CONSUMERS, ((HEAD_DIM, HEAD_DIM),) * (HELD + 1), HEAD_DIM),
        name="squared_update",
    ).s


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """The pieces of work of a call, and the steps of the ring for each: blocks of tokens of all heads of a group."""

    problem: Problem

    @property
    def blocks(self) -> int:
        """Of a chunk."""
        return self.problem.chunk // self.problem.tiles.tokens

    @property
    def parts(self) -> int:
        """64 tokens each, of a block."""
        return self.problem.tiles.tokens // HEAD_DIM

    @property
    def steps(self) -> int:
        """Of the ring, for a piece."""
        return self.problem.repeats * self.blocks

    @property
    def work(self) -> int:
        """How many pieces."""
        return self.problem.batch * self.problem.groups * self.problem.chunks * PIECES

    @property
    def programs(self) -> int:
        """How many programs share them."""
        return self.problem.tiles.programs_of(self.work)

    def ring(self, barriers) -> Ring:
        """The ring of blocks of tokens."""
        return Ring(self.problem.tiles.update_stages, *barriers)

    def each(self, program, body: Callable):
        """`step = body(i, step)` for each piece of the program; the last step of the ring."""
        return each_piece(self.work, self.programs, program, body, jnp.int32(0))

    def place(self, program, i):
        """Batch entry, group of heads, chunk and first tile of the program's i-th piece."""
        at, piece = split_index(program + i * self.programs, PIECES)
        at, c = split_index(at, self.problem.chunks)
        return *split_index(at, self.problem.groups), c, piece * PIECE


def _load(pieces: _Pieces, refs: Refs, program) -> None:
    def load_piece(i, step):
        return _load_piece(pieces, refs, pieces.place(program, i), step)

    pieces.ring(refs.scratch.ring).drain(pieces.each(program, load_piece))


def _load_piece(pieces: _Pieces, refs: Refs, place, step):
    """Fills the ring with the tokens of a piece, their vectors w and features of x; the next step."""
    b, g, c, first = place
    p, block, ring = pieces.problem, pieces.problem.tiles.tokens, pieces.ring(refs.scratch.ring)
    inputs, scratch = refs.inputs, refs.scratch
    sources = [_of_kind(first, functools.partial(_source, j=j)) for j in range(HEAD_DIM // BLOCK)]
    starts = [_of_kind(first, lambda kind, j=j: _features(kind, first)[j]) for j in range(2)]

    def fill(n, _):
        r, at = split_index(n, pieces.blocks)
        h, tokens = g * p.repeats + r, pl.ds(c * p.chunk + at * block, block)
        slot = ring.claim(step + n)
        full = ring.full.at[slot]
        plgpu.copy_gmem_to_smem(inputs.w.at[b, tokens, h], scratch.w.at[slot], full)
        for part in range(pieces.parts):
            of_part = pl.ds(c * p.chunk + at * block + part * HEAD_DIM, HEAD_DIM)
            for j, source in enumerate(sources):
                to = scratch.x.at[slot, part, pl.ds(j * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(inputs.x.at[b, h, pl.ds(source, BLOCK), of_part], to, full)
        for j, feature in enumerate(starts):
            to = scratch.features.at[slot, j]
            plgpu.copy_gmem_to_smem(inputs.x.at[b, h, pl.ds(feature, PIECE), tokens], to, full)

    lax.fori_loop(0, pieces.steps, fill, None)
    return step + pieces.steps


def _of_kind(first, value):
    """value(kind) of the kind that the tiles from `first` on have."""
    result = value(KINDS[0])
    for kind in KINDS[1:]:
        result = jnp.where(first >= kind.start, value(kind), result)
    return result


def _source(kind: Kind, j: int) -> int:
    """The first feature b of the rows from 16 j on."""
    row = j * BLOCK
    for band in kind.bands:
        if row < band.size:
            return band.first + row
        row -= band.size
    raise AssertionError


def _features(kind: Kind, first):
    """Where the two runs of 8 features begin that the 8 tiles from `first` on need as their a."""
    bands = kind.bands
    if bands[0].step == 1:
        return bands[0].feature + first - kind.start, bands[-1].feature + first - kind.start
    return bands[0].feature, bands[0].feature + PIECE


class _Share(NamedTuple):
    """What a consumer warpgroup has of a piece of work.

    pieces: of the call; refs: of the kernel; memory: of the warpgroup; place: of the piece, as in `_Pieces`;
    warpgroup: its number; step: of the ring, where the piece begins.
    """

    pieces: _Pieces
    refs: Refs
    memory: Scratch
    place: Any
    warpgroup: Any
    step: Any

    @property
    def own(self):
        """The number of the warpgroup's first tile among the 8."""
        return self.warpgroup * HELD


def _compute(pieces: _Pieces, refs: Refs, program, warpgroup, memory: Scratch) -> None:
    def multiply(i, step):
        place = pieces.place(program, i)
        share = _Share(pieces, refs, memory, place, warpgroup, step)
        for kind in KINDS:
            inside = (place[-1] >= kind.start) & (place[-1] < kind.start + kind.count)
            pl.when(inside)(functools.partial(_multiply, share, kind))
        return step + pieces.steps

    pieces.each(program, multiply)
    plgpu.wait_smem_to_gmem(0)


def _multiply(share: _Share, kind: Kind) -> None:
    """Writes a warpgroup's tiles, which are of this kind."""

    def past_tokens(*accumulators):
        lax.fori_loop(0, share.pieces.steps, functools.partial(_add, share, kind, accumulators), None)
        for m, acc in enumerate(accumulators):
            _store(share, m, read(acc))

    share.memory.accumulate(past_tokens, *[(HEAD_DIM, HEAD_DIM)] * HELD)


def _store(share: _Share, m: int, s) -> None:
    """Stores the warpgroup's m-th tile, which is on its way to device memory while the next are summed."""
    b, g, c, first = share.place
    buffer = share.refs.scratch.s.at[share.warpgroup, m]
    plgpu.wait_smem_to_gmem(HELD - 1, wait_read_only=True)  # the m-th tile of the piece before
    buffer[...] = s
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, share.refs.outputs.s.at[b, g, c, first + share.own + m])


def _add(share: _Share, kind: Kind, accumulators, n, _) -> None:
    """Adds the n-th block of tokens to the warpgroup's tiles."""
    scratch, memory, ring = share.refs.scratch, share.memory, share.pieces.ring(share.refs.scratch.ring)
    slot = ring.receive(share.step + n)
    for part in range(share.pieces.parts):
        tokens = pl.ds(part * HEAD_DIM, HEAD_DIM)
        matrix = plgpu.load(scratch.x.at[slot, part], layout=TILE)
        for m, acc in enumerate(accumulators):
            a = _factors(kind, scratch.features.at[slot], share.own + m, tokens)
            memory.add(acc, matrix * a, scratch.w.at[slot, tokens])
            memory.wait(1)
    memory.wait(0)
    ring.release(share.step + n)


def _factors(kind: Kind, features, tile, tokens):
    """The feature a of each row of a tile, for 64 tokens [64, 64]; `tile` is its number among the program's 8."""

    def columns_of(run, at):
        return columns(load_vector(features.at[run, at, tokens], COLUMN), (HEAD_DIM, HEAD_DIM))

    if len(kind.bands) == 1:
        return columns_of(0, tile)
    if kind.bands[0].step == 1:
        upper, lower = columns_of(0, tile), columns_of(1, tile)
    else:
        run, at = split_index(2 * tile, PIECE)
        upper, lower = columns_of(run, at), columns_of(run, at + 1)
    row = plgpu.broadcasted_iota(jnp.int32, (HEAD_DIM,), 0, layout=TILE.reduce(1))
    return jnp.where(rows(row < kind.bands[0].size, (HEAD_DIM, HEAD_DIM)), upper, lower)
