"""What the tokens of each chunk read from the state before it: N_i = S^T phi(x_i)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import Scratch, anew, load_vector, operand, read, rows, store
from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, KINDS, TILES, Kind
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.rows import CONSUMERS, ROLES, Rows, Share
from pallas_kernels.launch import Refs, launch_persistent
from pallas_kernels.ring import Ring


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    x: Any
    state: Any
    added: Any
    weight: Any | None
    normalizer: Any | None
    own_norm: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    y: Any
    norm: Any | None


@functools.partial(jax.jit, static_argnames=("problem", "power", "floor"))
def query(problem: Problem, x, state, weight, added, *, power: float = 1.0, normalizer=None, own_norm=None, floor=0.0):
    """added + weight N, with N_i = S_c^T phi(power x_i) and S_c the state of the token's chunk and group.

    With a normaliser, weights are divided by their sum: added is a quotient whose denominator n has log2 n = own_norm,
    and the result is (n added + weight N) / (n + weight n'), n'_i = power^2 x_i^T Z_c x_i, which is not negative; where
    the denominator is below `floor`, 0.

    A program takes 256 rows, 128 to each consumer warpgroup, past all tiles of the state. The left operand of their
    products, x times one feature of every row, is formed in registers.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, 64] bfloat16.
      state: [B, G, N, 40, 64, V] bfloat16.
      weight: [B, G, T] float32; None is 1.
      added: [B, T, H, V] bfloat16.
      power: a power of two.
      normalizer: Z as a sum of two, [B, G, N, 2, 64, 64] bfloat16.
      own_norm: [B, H, T] float32.
      floor: for denominators.

    Returns:
      [B, T, H, V] bfloat16, and with a normaliser log2 of the denominators [B, H, T] float32, +inf below `floor`.
    """
    p, halves, states, stages = problem, problem.tiles.halves, problem.tiles.states, problem.tiles.state_stages
    own = Rows(p)
    tile = operand((CONSUMERS, halves, HEAD_DIM, HEAD_DIM))
    norm = None if normalizer is None else jax.ShapeDtypeStruct(own_norm.shape, jnp.float32)
    y, norm = launch_persistent(
        functools.partial(_load, own),
        functools.partial(_compute, own, power, floor),
        Inputs(x, state, added, weight, normalizer, own_norm),
        Outputs(jax.ShapeDtypeStruct(added.shape, added.dtype), norm),
        {
            "x": tile,
            "x_rows": plgpu.SMEM((CONSUMERS, halves, HEAD_DIM, HEAD_DIM), jnp.bfloat16),
            "y": tile,
            "state": operand((stages, states, HEAD_DIM, HEAD_DIM)),
            "ring": Ring.barriers(stages, arrivals=1, users=CONSUMERS),
            "own_x": own.handover(1),
            "own_y": own.handover(1),
        },
        roles=ROLES,
        programs=own.programs,
        accumulators=Scratch.types(p.interpret, CONSUMERS, ((HEAD_DIM, HEAD_DIM),) * (halves + 1), HEAD_DIM),
        name="squared_query",
    )
    return y if normalizer is None else (y, norm)


def _load(own: Rows, refs: Refs, program) -> None:
    inputs, scratch = refs.inputs, refs.scratch
    ring = own.ring(scratch.ring)

    def load_piece(i, step):
        state = own.piece(program, i).state
        own.load(program, i, ((inputs.x, scratch.x),), scratch.own_x)
        if inputs.normalizer is not None:
            slot = ring.claim(step)
            to = scratch.state.at[slot, pl.ds(0, 2)]
            plgpu.copy_gmem_to_smem(inputs.normalizer.at[state], to, ring.full.at[slot])
            step = step + 1
        _load_state(own, refs, state, step)
        own.load(program, i, ((inputs.added, scratch.y),), scratch.own_y)
        return step + TILES // own.problem.tiles.states

    own.load_each(program, load_piece, ring, (scratch.own_x, scratch.own_y))


def _load_state(own: Rows, refs: Refs, state, step) -> None:
    """Fills the ring, from this step on, with all tiles of the state with this index."""
    tiles, ring = own.problem.tiles.states, own.ring(refs.scratch.ring)

    def fill(n, _):
        slot = ring.claim(step + n)
        source = refs.inputs.state.at[*state, pl.ds(n * tiles, tiles)]
        plgpu.copy_gmem_to_smem(source, refs.scratch.state.at[slot], ring.full.at[slot])

    lax.fori_loop(0, anew(jnp.int32(TILES // tiles)), fill, None)


def _compute(own: Rows, power: float, floor: float, refs: Refs, program, warpgroup, memory: Scratch) -> None:
    def read_piece(i, step):
        return _read(Share(own, refs, memory, own.piece(program, i), warpgroup), power, floor, step)

    own.compute_each(program, read_piece)


def _read(share: Share, power: float, floor: float, step):
    """Writes what a warpgroup's rows read of the state that begins at this step of the ring; the next step."""
    _, outputs, scratch = share.refs
    own_x = _take(share, power)
    sums = [None] * len(own_x)
    if share.refs.inputs.normalizer is not None:
        step, sums = _normalizers(share, own_x, step)
    step, numerators = _numerators(share, own_x, step)
    scratch.own_y.receive(share.warpgroup)
    for half in share.halves:
        _write(share, half, numerators[half], sums[half], floor)
    share.store(scratch.y, outputs.y, scratch.own_y)
    return step


def _take(share: Share, power: float):
    """x of each half times `power`, whose features are then in `x_rows`."""
    scratch, w = share.refs.scratch, share.warpgroup
    scratch.own_x.receive(w)
    own_x = []
    for half in share.halves:
        own_x.append(share.load(scratch.x, half) * power)
        store(scratch.x_rows.at[w, half].T, own_x[half])
    plgpu.commit_smem()
    scratch.own_x.release(w)
    return own_x


def _normalizers(share: Share, own_x, step):
    """The next step, and x^T Z x of each half."""
    slot = share.ring.receive(step)
    sums = [_normalizer(share, slot, x) for x in own_x]
    share.ring.release(step)
    return step + 1, sums


def _normalizer(share: Share, slot, x):
    """x^T Z x of each row of a half, which is not below 0; Z is in this buffer of the ring, as a sum of two."""

    def multiply(acc):
        for part in range(2):
            share.memory.add(acc, x, share.refs.scratch.state.at[slot, part])
        return read(acc)

    zx = share.memory.accumulate(multiply, (HEAD_DIM, HEAD_DIM))
    return jnp.maximum((zx * x.astype(jnp.float32)).sum(axis=1), 0.0)


def _numerators(share: Share, own_x, step):
    """The next step, and S^T phi(x) of each half."""

    def past_state(*accumulators):
        at = step
        for kind in KINDS:
            matrices = [_matrix(kind, x) for x in own_x]
            add = functools.partial(_add_tiles, share, kind, matrices, accumulators)
            at = lax.fori_loop(0, kind.count // share.own.problem.tiles.states, add, at)
        return at, [read(acc) for acc in accumulators]

    return share.accumulate(past_state)


def _add_tiles(share: Share, kind: Kind, matrices, accumulators, n, step):
    """Adds the products with the n-th tiles of a kind, and those beside them in a step; the next step."""
    tiles, memory, ring = share.own.problem.tiles.states, share.memory, share.ring
    slot = ring.receive(step)
    for j in range(tiles):
        for half, acc in enumerate(accumulators):
            left = matrices[half] * _factors(share, kind, half, n * tiles + j)
            memory.add(acc, left, share.refs.scratch.state.at[slot, j])
            memory.wait(1)
    memory.wait(0)
    ring.release(step)
    return step + 1


def _factors(share: Share, kind: Kind, half: int, tile):
    """The features a of the rows of a kind's tile, for each row of a half."""

    def of(band):
        return rows(share.feature(half, band.feature + tile * band.step), (HEAD_DIM, band.size))

    return _beside([of(band) for band in kind.bands])


def _write(share: Share, half: int, numerator, through, floor: float) -> None:
    """Stores what a half read, added to what it is given; with the sums `through` of what weighed it, divided."""
    inputs, _, scratch = share.refs
    own = share.rows(half)
    y = share.load(scratch.y, half).astype(jnp.float32)
    if inputs.weight is not None:
        weight = load_vector(inputs.weight.at[share.at.b, share.at.g, own])
        numerator = numerator * rows(weight, numerator.shape)
        through = None if through is None else through * weight
    y = y + numerator if through is None else _divide(share, own, y, numerator, through, floor)
    scratch.y[share.warpgroup, half] = y.astype(jnp.bfloat16)


def _divide(share: Share, own, y, numerator, through, floor: float):
    """(n y + numerator) / (n + through), of the rows `own`, where log2 n is `own_norm`; writes log2 of the divisor."""
    inputs, outputs, _ = share.refs
    inside = load_vector(inputs.own_norm.at[share.at.b, share.at.h, own])
    inside = jnp.exp2(jnp.where(inside == jnp.inf, -jnp.inf, inside))
    total = inside + through
    dead = total < floor
    inverse = jnp.where(dead, 0.0, 1.0 / total)
    y = y * rows(inside, y.shape) + numerator
    y = y * rows(inverse, y.shape)
    outputs.norm[share.at.b, share.at.h, own] = jnp.where(dead, jnp.inf, jnp.log2(total))
    return y


def _matrix(kind: Kind, x):
    """x with its features b in the order of the rows of the kind's tiles, times how many entries a row stands for."""
    pieces = []
    for band in kind.bands:
        for b in range(band.first, HEAD_DIM, BLOCK):
            piece = x[:, b : b + BLOCK]
            pieces.append(piece if b // BLOCK == band.feature // BLOCK else piece * 2)
    return _beside(pieces)


def _beside(pieces):
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
