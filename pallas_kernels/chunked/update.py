"""What each chunk adds to the state: S = sum_t phi(x_t) w_t^T, as tiles of `layout`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, TILE, Scratch, columns, load_vector, operand, read, rows
from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, KINDS, TILES
from pallas_kernels.chunked.problem import Problem, split_index
from pallas_kernels.launch import Roles, launch_persistent
from pallas_kernels.ring import Ring
from pallas_kernels.schedule import each_piece

CONSUMERS = 2
ROLES = Roles(CONSUMERS, consumer_registers=232, producer_registers=40)
HELD = 4  # tiles of a warpgroup
PIECE = CONSUMERS * HELD  # tiles of a program at a time: all of one kind
PIECES = TILES // PIECE


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
    p = problem
    block, stages = p.tiles.tokens, p.tiles.update_stages
    work = p.batch * p.groups * p.chunks * PIECES
    programs = p.tiles.programs_of(work)
    blocks, parts = p.chunk // block, block // HEAD_DIM
    steps = p.repeats * blocks

    def place(program, i):
        """Batch entry, group of heads, chunk and first tile of the program's i-th piece of work."""
        at, piece = split_index(program + i * programs, PIECES)
        at, c = split_index(at, p.chunks)
        return *split_index(at, p.groups), c, piece * PIECE

    def load(refs, program):
        inputs, scratch = refs.inputs, refs.scratch
        ring = Ring(stages, *scratch.ring)

        def load_piece(i, step):
            b, g, c, first = place(program, i)
            sources = [_of_kind(first, lambda kind, j=j: _source(kind, j)) for j in range(HEAD_DIM // BLOCK)]
            starts = [_of_kind(first, lambda kind, j=j: _features(kind, first)[j]) for j in range(2)]

            def fill(n, _):
                h, at = split_index(n, blocks)
                h, tokens = g * p.repeats + h, pl.ds(c * p.chunk + at * block, block)
                slot = ring.claim(step + n)
                full = ring.full.at[slot]
                plgpu.copy_gmem_to_smem(inputs.w.at[b, tokens, h], scratch.w.at[slot], full)
                for part in range(parts):
                    of_part = pl.ds(c * p.chunk + at * block + part * HEAD_DIM, HEAD_DIM)
                    for j, source in enumerate(sources):
                        to = scratch.x.at[slot, part, pl.ds(j * BLOCK, BLOCK)]
                        plgpu.copy_gmem_to_smem(inputs.x.at[b, h, pl.ds(source, BLOCK), of_part], to, full)
                for j, start in enumerate(starts):
                    to = scratch.features.at[slot, j]
                    plgpu.copy_gmem_to_smem(inputs.x.at[b, h, pl.ds(start, PIECE), tokens], to, full)

            lax.fori_loop(0, steps, fill, None)
            return step + steps

        ring.drain(each_piece(work, programs, program, load_piece, jnp.int32(0)))

    def compute(refs, program, warpgroup, memory):
        scratch, ring = refs.scratch, Ring(stages, *refs.scratch.ring)

        def multiply(i, step):
            b, g, c, first = place(program, i)
            own = warpgroup * HELD

            def tiles_of(kind):
                def accumulate(*accumulators):
                    def add(n, _):
                        slot = ring.receive(step + n)
                        for part in range(parts):
                            tokens = pl.ds(part * HEAD_DIM, HEAD_DIM)
                            matrix = plgpu.load(scratch.x.at[slot, part], layout=TILE)
                            for m, acc in enumerate(accumulators):
                                a = _factors(kind, scratch.features.at[slot], own + m, tokens)
                                memory.add(acc, matrix * a, scratch.w.at[slot, tokens])
                                memory.wait(1)
                        memory.wait(0)
                        ring.release(step + n)

                    lax.fori_loop(0, steps, add, None)
                    for m, acc in enumerate(accumulators):
                        refs.outputs.s[b, g, c, first + own + m] = read(acc)

                memory.accumulate(accumulate, *[(HEAD_DIM, HEAD_DIM)] * HELD)

            for kind in KINDS:
                inside = (first >= kind.start) & (first < kind.start + kind.count)
                pl.when(inside)(functools.partial(tiles_of, kind))
            return step + steps

        each_piece(work, programs, program, multiply, jnp.int32(0))

    # Behind a barrier a transposition moves memory and no more: fused with what makes x, it would read that by columns.
    columns_of_x = jnp.moveaxis(lax.optimization_barrier(x), 1, 3)
    return launch_persistent(
        load,
        compute,
        Inputs(columns_of_x, w),
        Outputs(jax.ShapeDtypeStruct((p.batch, p.groups, p.chunks, TILES, HEAD_DIM, HEAD_DIM), jnp.float32)),
        {
            "x": operand((stages, parts, HEAD_DIM, HEAD_DIM)),
            "features": plgpu.SMEM((stages, 2, PIECE, block), jnp.bfloat16),
            "w": operand((stages, block, HEAD_DIM)),
            "ring": Ring.barriers(stages, arrivals=1 + parts * HEAD_DIM // BLOCK + 2, users=CONSUMERS),
        },
        roles=ROLES,
        programs=programs,
        accumulators=Scratch.types(p.interpret, CONSUMERS, ((HEAD_DIM, HEAD_DIM),) * (HELD + 1), HEAD_DIM),
        name="squared_update",
    ).s


def _of_kind(first, value):
    """value(kind) of the kind that the tiles from `first` on have."""
    result = value(KINDS[0])
    for kind in KINDS[1:]:
        result = jnp.where(first >= kind.start, value(kind), result)
    return result


def _source(kind, j: int) -> int:
    """The first feature b of the rows from 16 j on."""
    row = j * BLOCK
    for band in kind.bands:
        if row < band.size:
            return band.first + row
        row -= band.size
    raise AssertionError


def _features(kind, first):
    """Where the two runs of 8 features begin that the 8 tiles from `first` on need as their a."""
    bands = kind.bands
    if bands[0].step == 1:
        return bands[0].feature + first - kind.start, bands[-1].feature + first - kind.start
    return bands[0].feature, bands[0].feature + PIECE


def _factors(kind, features, tile, tokens):
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
