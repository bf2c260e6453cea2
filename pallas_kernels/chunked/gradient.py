"""The gradient of the tokens that read from, or were added to, a state: dx_i = 2 Mat(S w_i) x_i."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import TILE, Scratch, anew, load_vector, operand, read, rows, store
from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.rows import CONSUMERS, ROLES, Rows
from pallas_kernels.launch import launch_persistent
from pallas_kernels.ring import Ring

BLOCKS = HEAD_DIM // BLOCK


class Inputs(NamedTuple):
    """Arrays of the kernel; half_tiles is the state by halves of its tiles."""

    x: Any
    w: Any
    state: Any
    half_tiles: Any
    added: Any
    normalizer: Any | None
    factor: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    y: Any
    sums: Any | None


@functools.partial(jax.jit, static_argnames=("problem", "want_sums"))
def gradient(problem: Problem, x, w, state, added, *, normalizer=None, factor=None, want_sums: bool = False):
    """added + 2 M_i x_i, with M_i = Mat(S_c w_i) + factor_i Z_c and S_c the state of the token's chunk.

    Mat(S w) is the symmetric matrix whose entry (a, b) is <S_ab, w>. The kernel takes it row by row, and so needs all
    pairs of features: where a tile's rows are not in the state, it loads their mirror images.

    Args:
      problem: sizes; its heads are those of x.
      x, w: [B, T, H, 64] bfloat16.
      state: [B, G, N, 40, 64, V] bfloat16.
      added: [B, T, H, 64] bfloat16.
      normalizer: Z as a sum of two, [B, G, N, 2, 64, 64] bfloat16.
      factor: [B, H, T] float32.
      want_sums: whether to return the sums below.

    Returns:
      [B, T, H, 64] bfloat16, and if `want_sums` <x_i, M_i x_i> [B, H, T] float32.
    """
    p = problem
    halves, states, stages = p.tiles.halves, p.tiles.states, p.tiles.state_stages
    own = Rows(p)
    normalize = normalizer is not None
    steps = HEAD_DIM // states

    def load(refs, program):
        inputs, scratch = refs.inputs, refs.scratch
        ring = Ring(stages, *scratch.ring)

        def load_piece(i, step):
            b, g, c, _, _ = own.place(program, i)
            own.load(program, i, ((inputs.x, scratch.x), (inputs.w, scratch.w)), scratch.own_x)
            if normalize:
                slot = ring.claim(step)
                for j in range(states):  # as many copies as in every other step: the barrier counts them
                    for k in range(BLOCKS):
                        part = pl.ds(k * BLOCK, BLOCK)
                        source = inputs.normalizer.at[b, g, c, j % 2, part]
                        plgpu.copy_gmem_to_smem(source, scratch.state.at[slot, j, part], ring.full.at[slot])
                step = step + 1

            for block in range(BLOCKS):

                def fill(n, _, block=block, step=step):
                    slot = ring.claim(step + n)
                    for j in range(states):
                        for k in range(BLOCKS):
                            source = _pairs(inputs.state, inputs.half_tiles, (b, g, c), block, n * states + j, k)
                            to = scratch.state.at[slot, j, pl.ds(k * BLOCK, BLOCK)]
                            plgpu.copy_gmem_to_smem(source, to, ring.full.at[slot])

                lax.fori_loop(0, anew(jnp.int32(BLOCK // states)), fill, None)
                step = step + BLOCK // states
            own.load(program, i, ((inputs.added, scratch.y),), scratch.own_y)
            return step

        ring.drain(own.each(program, load_piece, jnp.int32(0)))
        for w in range(CONSUMERS):
            scratch.own_x.drain(w)
            scratch.own_y.drain(w)

    def compute(refs, program, warpgroup, memory):
        inputs, outputs, scratch = refs
        ring = Ring(stages, *scratch.ring)

        def multiply(i, step):
            place = own.place(program, i)
            b, _, _, h, start = place
            scratch.own_x.receive(warpgroup)
            own_w, scaled = [], []
            for half in range(halves):
                x = plgpu.load(scratch.x.at[warpgroup, half], layout=TILE)
                store(scratch.x_rows.at[warpgroup, half].T, x)
                own_w.append(plgpu.load(scratch.w.at[warpgroup, half], layout=TILE))
                if normalize:
                    at = own.of(start, warpgroup, half)
                    factors = load_vector(inputs.factor.at[b, h, at])
                    scaled.append((x.astype(jnp.float32) * rows(factors, x.shape)).astype(jnp.bfloat16))
            plgpu.commit_smem()
            scratch.own_x.release(warpgroup)

            def accumulate(*accumulators):
                at = step
                if normalize:
                    slot = ring.receive(at)
                    for x, acc in zip(scaled, accumulators, strict=True):
                        memory.add(acc, x, scratch.state.at[slot, 0])
                        memory.add(acc, x, scratch.state.at[slot, 1])
                    memory.wait(0)
                    ring.release(at)
                    at = at + 1

                def add(n, _):
                    slot = ring.receive(at + n)
                    for j in range(states):
                        for half, acc in enumerate(accumulators):
                            feature = scratch.x_rows.at[warpgroup, half, n * states + j]
                            feature = load_vector(feature)
                            left = own_w[half] * rows(feature, (HEAD_DIM, HEAD_DIM))
                            memory.add(acc, left, scratch.state.at[slot, j].T)
                            memory.wait(1)
                    memory.wait(0)
                    ring.release(at + n)

                lax.fori_loop(0, steps, add, None)
                return at + steps, [read(acc) for acc in accumulators]

            step, gradients = memory.accumulate(accumulate, *[(HEAD_DIM, HEAD_DIM)] * halves)
            scratch.own_y.receive(warpgroup)
            for half, dx in enumerate(gradients):
                if want_sums:
                    x = plgpu.load(scratch.x_rows.at[warpgroup, half].T, layout=TILE, optimized=False)
                    outputs.sums[b, h, own.of(start, warpgroup, half)] = (x.astype(jnp.float32) * dx).sum(axis=1)
                y = plgpu.load(scratch.y.at[warpgroup, half], layout=TILE).astype(jnp.float32)
                scratch.y[warpgroup, half] = (y + dx * 2).astype(jnp.bfloat16)
            own.store(place, warpgroup, scratch.y, outputs.y, scratch.own_y)
            return step

        own.each(program, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    tile = operand((CONSUMERS, halves, HEAD_DIM, HEAD_DIM))
    half_tiles = state.reshape(*state.shape[:3], 2 * TILES, HEAD_DIM // 2, HEAD_DIM)
    optional = (normalizer, factor) if normalize else (None, None)
    sums = jax.ShapeDtypeStruct((p.batch, p.heads, p.tokens), jnp.float32) if want_sums else None
    y, sums = launch_persistent(
        load,
        compute,
        Inputs(x, w, state, half_tiles, added, *optional),
        Outputs(jax.ShapeDtypeStruct(added.shape, added.dtype), sums),
        {
            "x": tile,
            "w": tile,
            "x_rows": plgpu.SMEM((CONSUMERS, halves, HEAD_DIM, HEAD_DIM), jnp.bfloat16),
            "y": tile,
            "state": operand((stages, states, HEAD_DIM, HEAD_DIM)),
            "ring": Ring.barriers(stages, arrivals=states * BLOCKS, users=CONSUMERS),
            "own_x": own.handover(2),
            "own_y": own.handover(1),
        },
        roles=ROLES,
        programs=own.programs,
        accumulators=Scratch.types(p.interpret, CONSUMERS, ((HEAD_DIM, HEAD_DIM),) * (halves + 1), HEAD_DIM),
        name="squared_gradient",
    )
    return (y, sums) if want_sums else (y,)


def _pairs(tiles, half_tiles, at, block, i, k):
    """The 16 rows of a state that pair feature a = 16 block + i with those from b = 16 k on; see `layout.KINDS`.

    If b lies in an earlier block than a they are rows a of the tiles of those b. Tiles of the last kind are halves of
    32 rows, one for each a of block 2.
    """
    features, a = pl.ds(k * BLOCK, BLOCK), block * BLOCK + i
    if k >= block:
        if block < 2:
            return tiles.at[*at, a, features]
        if block == 2:
            return half_tiles.at[*at, 64 + i, pl.ds((k - 2) * BLOCK, BLOCK)]
        return tiles.at[*at, 16 + i, pl.ds(0, BLOCK)]
    if k < 2:
        return tiles.at[*at, features, a]
    return half_tiles.at[*at, pl.ds(64, BLOCK), a - 32]
