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
from pallas_kernels.chunked.rows import CONSUMERS, ROLES, Rows, Share
from pallas_kernels.launch import Refs, launch_persistent
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
    p, halves, states, stages = problem, problem.tiles.halves, problem.tiles.states, problem.tiles.state_stages
    own = Rows(p)
    tile = operand((CONSUMERS, halves, HEAD_DIM, HEAD_DIM))
    half_tiles = state.reshape(*state.shape[:3], 2 * TILES, HEAD_DIM // 2, HEAD_DIM)
    optional = (None, None) if normalizer is None else (normalizer, factor)
    sums = jax.ShapeDtypeStruct((p.batch, p.heads, p.tokens), jnp.float32) if want_sums else None
    y, sums = launch_persistent(
        functools.partial(_load, own),
        functools.partial(_compute, own),
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


def _load(own: Rows, refs: Refs, program) -> None:
    inputs, scratch = refs.inputs, refs.scratch

    def load_piece(i, step):
        state = own.piece(program, i).state
        own.load(program, i, ((inputs.x, scratch.x), (inputs.w, scratch.w)), scratch.own_x)
        if inputs.normalizer is not None:
            step = _load_normalizer(own, refs, state, step)
        for block in range(BLOCKS):
            step = _load_block(own, refs, state, block, step)
        own.load(program, i, ((inputs.added, scratch.y),), scratch.own_y)
        return step

    own.load_each(program, load_piece, own.ring(scratch.ring), (scratch.own_x, scratch.own_y))


def _load_normalizer(own: Rows, refs: Refs, state, step):
    """Puts the normaliser with this index into the ring; the next step."""
    ring = own.ring(refs.scratch.ring)
    slot = ring.claim(step)
    for j in range(own.problem.tiles.states):  # as many copies as in every other step: the barrier counts them
        for k in range(BLOCKS):
            part = pl.ds(k * BLOCK, BLOCK)
            source = refs.inputs.normalizer.at[*state, j % 2, part]
            plgpu.copy_gmem_to_smem(source, refs.scratch.state.at[slot, j, part], ring.full.at[slot])
    return step + 1


def _load_block(own: Rows, refs: Refs, state, block: int, step):
    """Fills the ring with the rows that pair the features a of a block with all b, 64 for each a; the next step."""
    inputs, ring, states = refs.inputs, own.ring(refs.scratch.ring), own.problem.tiles.states

    def fill(n, _):
        slot = ring.claim(step + n)
        for j in range(states):
            for k in range(BLOCKS):
                source = _pairs(inputs.state, inputs.half_tiles, state, block, n * states + j, k)
                to = refs.scratch.state.at[slot, j, pl.ds(k * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(source, to, ring.full.at[slot])

    lax.fori_loop(0, anew(jnp.int32(BLOCK // states)), fill, None)
    return step + BLOCK // states


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


def _compute(own: Rows, refs: Refs, program, warpgroup, memory: Scratch) -> None:
    def differentiate(i, step):
        return _differentiate(Share(own, refs, memory, own.piece(program, i), warpgroup), step)

    own.compute_each(program, differentiate)


def _differentiate(share: Share, step):
    """Writes the gradients of a warpgroup's rows, whose state begins at this step of the ring; the next step."""
    _, outputs, scratch = share.refs
    own_w, scaled = _take(share)
    step, gradients = _multiply(share, own_w, scaled, step)
    scratch.own_y.receive(share.warpgroup)
    for half, dx in enumerate(gradients):
        _write(share, half, dx)
    share.store(scratch.y, outputs.y, scratch.own_y)
    return step


def _take(share: Share):
    """w of each half, and with a normaliser x times its factor; the features of x are then in `x_rows`."""
    inputs, _, scratch = share.refs
    scratch.own_x.receive(share.warpgroup)
    own_w, scaled = [], []
    for half in share.halves:
        x = share.load(scratch.x, half)
        store(scratch.x_rows.at[share.warpgroup, half].T, x)
        own_w.append(share.load(scratch.w, half))
        if inputs.normalizer is not None:
            at = share.rows(half)
            factors = load_vector(inputs.factor.at[share.at.b, share.at.h, at])
            scaled.append((x.astype(jnp.float32) * rows(factors, x.shape)).astype(jnp.bfloat16))
    plgpu.commit_smem()
    scratch.own_x.release(share.warpgroup)
    return own_w, scaled


def _multiply(share: Share, own_w, scaled, step):
    """The next step, and M x of each half."""
    steps = HEAD_DIM // share.own.problem.tiles.states

    def past_state(*accumulators):
        at = _add_normalizer(share, scaled, accumulators, step) if scaled else step
        lax.fori_loop(0, steps, functools.partial(_add_features, share, own_w, accumulators, at), None)
        return at + steps, [read(acc) for acc in accumulators]

    return share.accumulate(past_state)


def _add_normalizer(share: Share, scaled, accumulators, step):
    """Adds Z factor x of each half; the next step."""
    memory, scratch, ring = share.memory, share.refs.scratch, share.ring
    slot = ring.receive(step)
    for x, acc in zip(scaled, accumulators, strict=True):
        memory.add(acc, x, scratch.state.at[slot, 0])
        memory.add(acc, x, scratch.state.at[slot, 1])
    memory.wait(0)
    ring.release(step)
    return step + 1


def _add_features(share: Share, own_w, accumulators, step, n, _) -> None:
    """Adds, for each feature a of the n-th step after `step`, x_a times <S_ab, w> for all b."""
    memory, scratch, ring = share.memory, share.refs.scratch, share.ring
    states = share.own.problem.tiles.states
    slot = ring.receive(step + n)
    for j in range(states):
        for half, acc in enumerate(accumulators):
            left = own_w[half] * rows(share.feature(half, n * states + j), (HEAD_DIM, HEAD_DIM))
            memory.add(acc, left, scratch.state.at[slot, j].T)
            memory.wait(1)
    memory.wait(0)
    ring.release(step + n)


def _write(share: Share, half: int, dx) -> None:
    """Stores twice the products of a half, added to what it is given; writes their inner products with x if wanted."""
    _, outputs, scratch = share.refs
    if outputs.sums is not None:
        x = plgpu.load(scratch.x_rows.at[share.warpgroup, half].T, layout=TILE, optimized=False)
        outputs.sums[share.at.b, share.at.h, share.rows(half)] = (x.astype(jnp.float32) * dx).sum(axis=1)
    y = share.load(scratch.y, half).astype(jnp.float32)
    scratch.y[share.warpgroup, half] = (y + dx * 2).astype(jnp.bfloat16)
