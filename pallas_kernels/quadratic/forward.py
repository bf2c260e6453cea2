"""The forward kernel of quadratic attention: outputs, and the logarithms of the row sums if a gradient needs them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.accumulator import ROW, Scratch, anew, load_vector, operand, read, rows
from pallas_kernels.launch import Refs, launch_persistent
from pallas_kernels.quadratic.keys import KeyBuffers, Keys, KeyTile
from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.quadratic.own import OwnTiles, Rows
from pallas_kernels.quadratic.tuning import ROWS, Tiles

LOWEST = -1e30  # below every logit, and finite: differences of it are no NaN


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    q: Any
    k: Any
    v: Any
    decay: Decay | None
    first_visible: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    y: Any
    norm: Any | None


def forward(
    problem: Problem, tiles: Tiles, programs: int, q, k, v, decay: Decay | None, first_visible, *, save_norm: bool
):
    """y [B, T, H, V] and, if `save_norm`, log2 of the row sums [B, H, T padded to block_q] (+inf where the row is 0).

    A program takes tiles of block_q query rows, 64 to each consumer warpgroup, past the keys that they see, which the
    producer warpgroup loads. A row's sum adds weights in float32; where few keys may be in sight (in masked tiles) it
    adds them as the product with the values sees them, rounded to bfloat16, so that a row with one key is its value.
    """
    p, consumers, dim = problem, tiles.consumers, problem.head_dim
    own = OwnTiles.make(p, tiles, p.heads, programs, ascending=True)
    padded = p.tiles(tiles.own) * tiles.own
    norm = jax.ShapeDtypeStruct((p.batch, p.heads, padded), jnp.float32) if save_norm else None
    y, norm = launch_persistent(
        functools.partial(_load, own),
        functools.partial(_compute, own),
        Inputs(q, k, v, decay, first_visible),
        Outputs(jax.ShapeDtypeStruct(q.shape, q.dtype), norm),
        {
            "q": operand((consumers, ROWS, dim)),
            "y": operand((consumers, ROWS, dim)),
            "keys": KeyBuffers.types(own, decay is not None),
            "own": own.handover(1),
        },
        roles=tiles.roles,
        programs=own.schedule.programs,
        accumulators=Scratch.types(p.interpret, consumers, ((ROWS, dim),), max(tiles.streamed, dim)),
        name=f"{p.score}_forward",
    )
    return (y, norm) if save_norm else (y,)


def _load(own: OwnTiles, refs: Refs, program) -> None:
    own.load(program, [(refs.inputs.q, refs.scratch.q)], refs.scratch.own, Keys(own, refs.inputs, refs.scratch.keys))


def _compute(own: OwnTiles, refs: Refs, program, warpgroup, memory: Scratch) -> None:
    def attend(i, step):
        return _attend(own, refs, memory, Rows.of(own.tile(program, i), warpgroup), step)

    own.each(program, attend, Keys(own, refs.inputs, refs.scratch.keys))


class _Walk(NamedTuple):
    """A walk of 64 rows past the keys that they see.

    query: the operand [64, K]; prefix: of the decays, [64] or None; acc: the sum of weighted values [64, V].
    """

    problem: Problem
    tiles: Tiles
    memory: Scratch
    query: Any
    prefix: Any | None
    acc: Any


class _Sums(NamedTuple):
    """What the rows carry: the sums of their weights, and the logits from which exp counts those."""

    total: Any
    largest: Any


def _attend(own: OwnTiles, refs: Refs, memory: Scratch, at: Rows, step):
    """Writes the outputs of 64 rows, whose walk begins at this step of the ring; the next step."""
    p, decay, scratch = own.problem, refs.inputs.decay, refs.scratch
    keys = Keys(own, refs.inputs, scratch.keys)
    (query,) = own.take([scratch.q], scratch.own, at.warpgroup, p.query_power)
    prefix = None if decay is None else load_vector(decay.prefix.at[at.b, at.g, at.slice])
    tile = _exp_tile if p.score == "exp" else _power_tile

    def past_keys(acc):
        walk = _Walk(p, own.tiles, memory, query, prefix, acc)
        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        sums = _Sums(zero, zero + LOWEST)
        return keys.walk(step, at, functools.partial(tile, walk), functools.partial(_turn, walk), sums), read(acc)

    (step, sums), y = memory.accumulate(past_keys, (ROWS, p.head_dim))
    own.give_up(scratch.own, at.warpgroup)
    if late := p.late_scale(prefix is not None):
        sums = sums._replace(largest=sums.largest * late)
    _write(p, refs, at, y, sums)
    return step


def _exp_tile(walk: _Walk, keys: KeyTile, sums: _Sums) -> _Sums:
    """Adds a tile of keys whose weights are exponentials."""
    whole = pl.ds(0, walk.tiles.streamed)
    column = seen = None
    if not keys.masked:
        column = keys.decays(whole)  # while the product is in flight
    s = walk.memory.product(walk.query, keys.k(whole).T)
    keys.release()
    if keys.masked:
        column, seen = keys.decays(whole), keys.mask(whole)  # registers are scarce
    late = walk.problem.late_scale(walk.prefix is not None)
    logits = s if late else s * walk.problem.logit_scale
    if column is not None:
        logits = logits + column
        logits = logits + rows(walk.prefix, s.shape) if keys.beside else logits
    logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
    if walk.problem.normalize:
        logits, sums = _from_largest(walk, logits, sums, late or 1.0)
    weights = jnp.exp2(logits)
    rounded = weights.astype(jnp.bfloat16)
    if seen is not None and walk.prefix is None:  # with a decay no register is left for it
        rounded = anew(rounded)  # so that they are rounded in pairs, and not each for the sums
    sums = _add(walk, sums, weights, rounded, seen)
    walk.memory.add(walk.acc, rounded, keys.v(whole))
    return sums


def _from_largest(walk: _Walk, logits, sums: _Sums, scale: float):
    """The logits, and all that was summed, counted from the largest logit so far, and times the scale."""
    largest = jnp.maximum(sums.largest, logits.max(axis=1))
    shrink = jnp.exp2((sums.largest - largest) * scale)
    total = sums.total * shrink
    walk.acc[...] = read(walk.acc) * rows(shrink, walk.acc.shape)
    return (logits - rows(largest, logits.shape)) * scale, _Sums(total, largest)


def _power_tile(walk: _Walk, keys: KeyTile, sums: _Sums) -> _Sums:
    """Adds a tile of keys whose weights are powers of their scores, slice by slice."""
    # A mask and a decay for each pair take registers that a whole tile does not leave.
    size = ROWS if keys.masked and walk.prefix is not None else walk.tiles.columns
    parts = [pl.ds(begin, size) for begin in range(0, walk.tiles.streamed, size)]
    factors = [None if keys.masked else keys.decays(part) for part in parts]

    def weigh(products):
        after = sums
        for i, (part, factor) in enumerate(zip(parts, factors, strict=True)):
            s = products.take(i)
            if i == 0:
                keys.release()
            weights, seen = _power_weights(walk, keys, part, s, factor)
            rounded = weights.astype(jnp.bfloat16)
            products.add(walk.acc, rounded, keys.v(part))
            after = _add(walk, after, weights, rounded, seen)
        return after

    return walk.memory.multiply(weigh, *((walk.query, keys.k(part).T, None) for part in parts))


def _power_weights(walk: _Walk, keys: KeyTile, part: pl.Slice, s, factor):
    """The weights of a slice's scores, of which `factor` is the decay unless masked; and who is seen, None: all."""
    seen = None
    if keys.masked:
        factor, seen = keys.decays(part), keys.mask(part)  # registers are scarce
    pairwise = factor is not None and keys.beside
    if pairwise:
        factor = jnp.exp2(jnp.where(seen, factor + rows(walk.prefix, s.shape), -jnp.inf))
    weights = s if factor is None else s * factor
    weights = weights * s if walk.problem.score == "squared" else weights
    if seen is not None and not pairwise:
        weights = jnp.where(seen, weights, 0.0)
    return weights, seen


def _add(walk: _Walk, sums: _Sums, weights, rounded, seen) -> _Sums:
    """Adds weights to their rows' sums."""
    if not walk.problem.normalize:
        return sums
    added = weights if seen is None else rounded.astype(jnp.float32)
    return sums._replace(total=sums.total + added.sum(axis=1))


def _turn(walk: _Walk, sums: _Sums) -> _Sums:
    """From here on weights count from the row itself, no longer from the start of its tile."""
    if walk.prefix is None:
        return sums
    if walk.problem.score == "exp" and walk.problem.normalize:
        return sums._replace(largest=sums.largest + walk.prefix)
    factor = jnp.exp2(walk.prefix)
    walk.acc[...] = read(walk.acc) * rows(factor, walk.acc.shape)
    return sums._replace(total=sums.total * factor)


def _write(problem: Problem, refs: Refs, at: Rows, y, sums: _Sums) -> None:
    """Divides by the sums and writes."""
    p, w = problem, at.warpgroup
    if p.normalize:
        dead = sums.total < p.floor
        y = y * rows(jnp.where(dead, 0.0, 1.0 / sums.total), y.shape)
        if refs.outputs.norm is not None:
            norm = jnp.log2(sums.total)
            norm = norm + sums.largest if p.score == "exp" else norm
            refs.outputs.norm[at.b, at.h, at.slice] = jnp.where(dead, jnp.inf, norm)
    elif p.output_scale != 1:
        y = y * p.output_scale
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.scratch.y[w] = y.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.scratch.y.at[w], refs.outputs.y.at[at.b, at.slice, at.h])
