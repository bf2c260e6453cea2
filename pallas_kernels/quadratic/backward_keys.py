"""The gradients of the keys and values, and the column sums that the gradient of the decays needs."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.accumulator import ROW, Scratch, anew, load_vector, operand, read, rows
from pallas_kernels.launch import Refs, launch_persistent
from pallas_kernels.quadratic.operands import SMALLEST_DECAY, Decay, Problem, slope_of
from pallas_kernels.quadratic.own import OwnTiles, Rows
from pallas_kernels.quadratic.queries import Queries, QueryBuffers, QueryTile
from pallas_kernels.quadratic.tuning import ROWS, Tiles


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    q: Any
    k: Any
    v: Any
    dy: Any
    logit: Any | None
    delta: Any | None
    decay: Decay | None
    last_visible: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    dk: Any
    dv: Any
    sums: Any | None


def backward_keys(
    problem: Problem, tiles: Tiles, programs: int, q, k, v, dy, logit, delta, decay: Decay | None, last_visible
):
    """dk [B, T, G, K], dv and, with a decay, sum_i W_ij [B, G, T padded to block_kv]; W as in `operands.slope_of`.

    Everything is transposed: a program takes tiles of block_kv keys, 64 to each consumer warpgroup, past the queries
    that see them. logit and delta are as in `Queries`.
    """
    p, consumers, dim = problem, tiles.consumers, problem.head_dim
    own = OwnTiles.make(p, tiles, p.kv_heads, programs, ascending=False)
    padded = p.tiles(tiles.own) * tiles.own
    sums = None if decay is None else jax.ShapeDtypeStruct((p.batch, p.kv_heads, padded), jnp.float32)
    depth = min(64, tiles.columns)
    tile = operand((consumers, ROWS, dim), depth)
    dk, dv, sums = launch_persistent(
        functools.partial(_load, own),
        functools.partial(_compute, own),
        Inputs(q, k, v, dy, logit, delta, decay, last_visible),
        Outputs(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), sums),
        {
            "k": tile,
            "v": tile,
            "dk": tile,
            "dv": tile,
            "queries": QueryBuffers.types(own, logit is not None, depth),
            "own": own.handover(2),
        },
        roles=tiles.roles,
        programs=own.schedule.programs,
        accumulators=Scratch.types(p.interpret, consumers, ((ROWS, dim), (ROWS, dim)), max(tiles.streamed, dim), depth),
        name=f"{p.score}_backward_keys",
    )
    return (dk, dv) if sums is None else (dk, dv, sums)


def _load(own: OwnTiles, refs: Refs, program) -> None:
    inputs, scratch = refs.inputs, refs.scratch
    queries = Queries(own, inputs, scratch.queries)
    own.load(program, [(inputs.k, scratch.k), (inputs.v, scratch.v)], scratch.own, queries)


def _compute(own: OwnTiles, refs: Refs, program, warpgroup, memory: Scratch) -> None:
    def differentiate(i, step):
        def place():
            return Rows.of(own.tile(program, anew(i)), anew(warpgroup))

        return _differentiate(own, refs, memory, place, warpgroup, step)

    own.each(program, differentiate, Queries(own, refs.inputs, refs.scratch.queries))


class _Walk(NamedTuple):
    """A walk of 64 rows of keys past the queries that see them.

    decay: in device memory; place: where the keys are, computed anew at each call; operands: the keys and values
    [64, K], likewise; suffix: of the keys' decays in their tile [64], for exp, or None; dk, dv: the sums of queries
    times their slopes and of gradients times their weights, [64, K].
    """

    problem: Problem
    tiles: Tiles
    memory: Scratch
    decay: Decay | None
    place: Callable[[], Rows]
    operands: Callable[[], Sequence[Any]]
    suffix: Any | None
    dk: Any
    dv: Any


def _differentiate(own: OwnTiles, refs: Refs, memory: Scratch, place: Callable[[], Rows], warpgroup, step):
    """Writes the gradients of 64 keys, whose walk begins at this step of the ring; the next step.

    `place()` is where they are, computed anew at each call: registers are scarce in the walk.
    """
    p, decay, scratch = own.problem, refs.inputs.decay, refs.scratch
    at, queries = place(), Queries(own, refs.inputs, scratch.queries)
    taken = own.take([scratch.k, scratch.v], scratch.own, at.warpgroup, p.key_power)
    suffix = None
    if decay is not None and p.score == "exp":
        suffix = load_vector(decay.suffix.at[at.b, at.g, at.slice])

    def operands():
        if own.tiles.resident:
            return taken
        w = anew(warpgroup)
        return scratch.k.at[w], scratch.v.at[w]

    def past_queries(dk, dv):
        walk = _Walk(p, own.tiles, memory, decay, place, operands, suffix, dk, dv)
        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        state = queries.walk(step, place, functools.partial(_tile, walk), functools.partial(_turn, walk), zero)
        return state, read(dk), read(dv)

    (step, sums), dk, dv = memory.accumulate(past_queries, (ROWS, p.head_dim), (ROWS, p.head_dim))
    _write(own, refs, place(), dk, dv, sums)
    return step


def _tile(walk: _Walk, queries: QueryTile, sums):
    """Adds a tile of queries and of gradients, slice by slice; the sums of W."""
    size = walk.tiles.columns
    for begin in range(0, walk.tiles.streamed, size):
        sums = _slice(walk, queries, pl.ds(begin, size), sums)
    return sums


def _slice(walk: _Walk, queries: QueryTile, part: pl.Slice, sums):
    """Adds a slice of a tile."""
    score, lean, has_decay = walk.problem.score, walk.tiles.lean, walk.decay is not None
    early = None if lean else queries.columns(part)

    def weigh(products):
        s = products.take(0)
        if part.start == 0:
            queries.release()
        dw = products.take(1) if lean else None
        logit, delta, seen = early or queries.columns(part)
        dw = dw - delta if lean and delta is not None else dw
        factor, pairwise = _factor(walk, queries, s, logit, seen)
        slope = slope_of(score, s, factor)
        weights = factor if score == "exp" else s if slope is None else slope * s
        if seen is not None and not pairwise:
            weights = jnp.where(seen, weights, 0.0)
        if not lean:
            products.add(walk.dv, weights.astype(jnp.bfloat16), queries.dy(part))
            dw = products.take(1)
        ds = dw if slope is None else slope * dw
        if seen is not None and not pairwise:
            ds = jnp.where(seen, ds, 0.0)
        if lean:
            products.add(walk.dv, weights.astype(jnp.bfloat16), queries.dy(part))
        products.add(walk.dk, ds.astype(jnp.bfloat16), queries.q(part))
        if not has_decay:
            return sums
        return sums + (ds if score == "exp" else ds * s).sum(axis=1)

    start = None if lean or early[1] is None else -early[1]
    key, value = walk.operands()
    return walk.memory.multiply(weigh, (key, queries.q(part).T, None), (value, queries.dy(part).T, start))


def _factor(walk: _Walk, queries: QueryTile, s, logit, seen):
    """What multiplies each pair's score, for exp the whole weight; and whether it is 0 where a pair is not seen."""
    p, at, row = walk.problem, queries.rows, walk.suffix
    if queries.beside and walk.decay is not None:
        row = -load_vector(walk.decay.prefix.at[at.b, at.g, at.slice])  # not kept: registers are scarce in the walk
    elif p.score != "exp":
        return logit, False
    terms = [s * p.logit_scale] if p.score == "exp" else []
    terms += [] if row is None else [rows(row, s.shape)]
    terms += [] if logit is None else [logit]
    total = functools.reduce(operator.add, terms)
    if p.score == "exp" and p.normalize:
        total = jnp.minimum(total, 0.0)  # logits of 2^60 differ by more than they are apart
    return jnp.exp2(total if seen is None else jnp.where(seen, total, -jnp.inf)), True


def _turn(walk: _Walk, sums):
    """From here on weights count from the key itself, no longer from the end of its tile."""
    if walk.decay is None or walk.problem.score == "exp":
        return sums
    at = walk.place()
    suffix = load_vector(walk.decay.suffix.at[at.b, at.g, at.slice])
    factor = jnp.where(suffix >= SMALLEST_DECAY, jnp.exp2(suffix), 0.0)

    def decayed(sums, factor):
        # Where it is 0 the sums may be infinite, or no number.
        return jnp.where(factor > 0, sums * factor, 0.0)

    for acc in (walk.dk, walk.dv):
        acc[...] = decayed(read(acc), rows(factor, acc.shape))
    return decayed(sums, factor)


def _write(own: OwnTiles, refs: Refs, at: Rows, dk, dv, sums) -> None:
    outputs, scratch, w = refs.outputs, refs.scratch, at.warpgroup
    slope_scale, weight_scale = own.problem.key_scales
    own.give_up(scratch.own, w)
    if outputs.sums is not None:
        outputs.sums[at.b, at.g, at.slice] = sums * weight_scale
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    scratch.dk[w] = (dk * slope_scale).astype(jnp.bfloat16)
    scratch.dv[w] = (dv * weight_scale).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.dk.at[w], outputs.dk.at[at.b, at.slice, at.g])
    plgpu.copy_smem_to_gmem(scratch.dv.at[w], outputs.dv.at[at.b, at.slice, at.g])
