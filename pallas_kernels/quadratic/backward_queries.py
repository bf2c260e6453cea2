"""The gradient of the queries, and the row sums that the gradient of the decays needs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.accumulator import ROW, Scratch, load_vector, operand, read, rows
from pallas_kernels.launch import Refs, launch_persistent
from pallas_kernels.quadratic.keys import KeyBuffers, Keys, KeyTile
from pallas_kernels.quadratic.operands import Decay, Problem, slope_of
from pallas_kernels.quadratic.own import OwnTiles, Rows
from pallas_kernels.quadratic.tuning import ROWS, Tiles


class Inputs(NamedTuple):
    """Arrays of the kernel."""

    q: Any
    k: Any
    v: Any
    dy: Any
    norm: Any | None
    delta: Any | None
    decay: Decay | None
    first_visible: Any | None


class Outputs(NamedTuple):
    """What it writes."""

    dq: Any
    sums: Any | None


def backward_queries(
    problem: Problem,
    tiles: Tiles,
    programs: int,
    q,
    k,
    v,
    dy,
    norm,
    delta,
    decay: Decay | None,
    first_visible,
    *,
    late_delta: bool,
):
    """dq [B, T, H, K] and, with a decay, sum_j W_ij [B, H, T padded to block_q]; W as in `operands.slope_of`.

    The traversal is that of the forward kernel. norm is log2 of the row sums and delta <dy, y>, both [B, H, T padded to
    block_q]; None where nothing is normalised. `late_delta`: the product <dy, v> does not start from -delta, delta is
    subtracted at its end, as the keys' kernel does: what cancels in the decays' gradient must be rounded alike.
    """
    p, consumers, dim = problem, tiles.consumers, problem.head_dim
    own = OwnTiles.make(p, tiles, p.heads, programs, ascending=True)
    padded = p.tiles(tiles.own) * tiles.own
    sums = None if decay is None else jax.ShapeDtypeStruct((p.batch, p.heads, padded), jnp.float32)
    tile = operand((consumers, ROWS, dim))
    dq, sums = launch_persistent(
        functools.partial(_load, own),
        functools.partial(_compute, own, late_delta),
        Inputs(q, k, v, dy, norm, delta, decay, first_visible),
        Outputs(jax.ShapeDtypeStruct(q.shape, q.dtype), sums),
        {
            "q": tile,
            "dy": tile,
            "dq": tile,
            "keys": KeyBuffers.types(own, decay is not None),
            "own": own.handover(2),
        },
        roles=tiles.roles,
        programs=own.schedule.programs,
        accumulators=Scratch.types(p.interpret, consumers, ((ROWS, dim),), max(tiles.streamed, dim)),
        name=f"{p.score}_backward_queries",
    )
    return (dq,) if sums is None else (dq, sums)


def _load(own: OwnTiles, refs: Refs, program) -> None:
    inputs, scratch = refs.inputs, refs.scratch
    keys = Keys(own, inputs, scratch.keys)
    own.load(program, [(inputs.q, scratch.q), (inputs.dy, scratch.dy)], scratch.own, keys)


def _compute(own: OwnTiles, late_delta: bool, refs: Refs, program, warpgroup, memory: Scratch) -> None:
    def differentiate(i, step):
        at = Rows.of(own.tile(program, i), warpgroup)
        return _differentiate(own, late_delta, refs, memory, at, step)

    own.each(program, differentiate, Keys(own, refs.inputs, refs.scratch.keys))


class _Walk(NamedTuple):
    """A walk of 64 rows past the keys that they see.

    query, dy: the operands [64, K]; delta, prefix: of the rows, [64] or None; row_logit: what a logit of exp has of
    the row itself, [64] or None; acc: the sum of keys times their slopes [64, K].
    """

    problem: Problem
    tiles: Tiles
    memory: Scratch
    late_delta: bool
    query: Any
    dy: Any
    delta: Any | None
    prefix: Any | None
    row_logit: Any | None
    acc: Any


def _differentiate(own: OwnTiles, late_delta: bool, refs: Refs, memory: Scratch, at: Rows, step):
    """Writes the gradient of 64 rows, whose walk begins at this step of the ring; the next step."""
    p, inputs, scratch = own.problem, refs.inputs, refs.scratch
    keys = Keys(own, inputs, scratch.keys)
    query, dy = own.take([scratch.q, scratch.dy], scratch.own, at.warpgroup, p.query_power)
    delta = load_vector(inputs.delta.at[at.b, at.h, at.slice]) if p.normalize else None
    norm = load_vector(inputs.norm.at[at.b, at.h, at.slice]) if p.normalize else None
    prefix = None if inputs.decay is None else load_vector(inputs.decay.prefix.at[at.b, at.g, at.slice])
    row_logit = None if norm is None else -norm
    row_logit = row_logit if prefix is None else prefix if norm is None else prefix - norm

    def past_keys(acc):
        walk = _Walk(p, own.tiles, memory, late_delta, query, dy, delta, prefix, row_logit, acc)
        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        return keys.walk(step, at, functools.partial(_tile, walk), functools.partial(_turn, walk), zero), read(acc)

    (step, sums), dq = memory.accumulate(past_keys, (ROWS, p.head_dim))
    own.give_up(scratch.own, at.warpgroup)
    _write(p, refs, at, dq, sums, norm)
    return step


def _tile(walk: _Walk, keys: KeyTile, sums):
    """Adds a tile of keys times their slopes; the sums of W."""
    p, whole = walk.problem, pl.ds(0, walk.tiles.streamed)
    needs_scores = p.score != "linear" or walk.prefix is not None  # the slope of a linear score is 1
    column = keys.decays(whole)
    early = p.normalize and not walk.late_delta
    start = rows(-walk.delta, (ROWS, whole.size)) if early else None

    def weigh(products):
        s = products.take(0) if needs_scores else None
        if needs_scores:
            keys.release()
        seen = keys.mask(whole) if keys.masked else None
        factor, pairwise = _factor(walk, keys, s, column, seen)
        slope = slope_of(p.score, s, factor)
        dw = products.take(1 if needs_scores else 0)
        if not needs_scores:
            keys.release()
        dw = dw - rows(walk.delta, dw.shape) if p.normalize and not early else dw
        ds = dw if slope is None else slope * dw
        if seen is not None and not pairwise:
            ds = jnp.where(seen, ds, 0.0)
        products.add(walk.acc, ds.astype(jnp.bfloat16), keys.k(whole))
        if walk.prefix is None:
            return sums
        return sums + (ds if p.score == "exp" else ds * s).sum(axis=1)

    scores = ((walk.query, keys.k(whole).T, None),) if needs_scores else ()
    return walk.memory.multiply(weigh, *scores, (walk.dy, keys.v(whole).T, start))


def _factor(walk: _Walk, keys: KeyTile, s, column, seen):
    """What multiplies each pair's score, for exp the whole weight; and whether it is 0 where a pair is not seen."""
    if walk.problem.score == "exp":
        factor = _logits(walk, s, column)
    elif column is not None and keys.beside:
        factor = column + rows(walk.prefix, s.shape)
    else:
        return column, False
    return jnp.exp2(factor if seen is None else jnp.where(seen, factor, -jnp.inf)), True


def _logits(walk: _Walk, s, column):
    """log2 of the weights of exp, less that of their row's sum."""
    logits = s * walk.problem.logit_scale
    logits = logits if column is None else logits + column
    logits = logits if walk.row_logit is None else logits + rows(walk.row_logit, s.shape)
    # Logits of 2^60 differ by more than they are apart.
    return jnp.minimum(logits, 0.0) if walk.problem.normalize else logits


def _turn(walk: _Walk, sums):
    """From here on weights count from the row itself, no longer from the start of its tile."""
    if walk.prefix is None or walk.problem.score == "exp":
        return sums
    factor = jnp.exp2(walk.prefix)
    walk.acc[...] = read(walk.acc) * rows(factor, walk.acc.shape)
    return sums * factor


def _write(problem: Problem, refs: Refs, at: Rows, dq, sums, norm) -> None:
    """Divides by the row sums where the weights have not been, and writes."""
    p, outputs, scratch, w = problem, refs.outputs, refs.scratch, at.warpgroup
    if p.normalize and p.score != "exp":
        inverse = jnp.exp2(-norm)
        dq, sums = dq * rows(inverse, dq.shape), sums * inverse
    if outputs.sums is not None:
        outputs.sums[at.b, at.h, at.slice] = sums * p.output_scale
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    scratch.dq[w] = (dq * p.gradient_scale).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.dq.at[w], outputs.dq.at[at.b, at.slice, at.h])
