"""The gradients of the keys and values, and the column sums that the gradient of the decays needs."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, Scratch, anew, operand, read, rows
from pallas_kernels.launch import launch_persistent
from pallas_kernels.quadratic.operands import SMALLEST_DECAY, Decay, Problem, slope_of
from pallas_kernels.quadratic.queries import ROWS, Place, Queries, QueryBuffers
from pallas_kernels.quadratic.tuning import Tiles
from pallas_kernels.schedule import Schedule


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
    p, block_kv = problem, tiles.own
    consumers = tiles.consumers
    score = p.score
    repeats = p.heads // p.kv_heads
    lean = tiles.lean
    slope_scale, weight_scale = p.key_scales
    schedule = Schedule.make(
        p.batch * p.kv_heads,
        p.tiles(block_kv),
        4 * p.tokens * p.head_dim * repeats,
        programs,
        ascending=False,
    )

    def queries_of(refs):
        inputs = refs.inputs
        total = None if inputs.decay is None else inputs.decay.total
        of_queries = inputs.q, inputs.dy, inputs.logit, inputs.delta, total, inputs.last_visible
        return Queries(p, tiles.streamed, block_kv, tiles.num_stages, *of_queries, refs.scratch.queries)

    def tile_of(program, i):
        """Batch entry, key/value head and first key of the program's i-th tile."""
        head, tile = schedule.tile(program, i)
        return lax.div(head, p.kv_heads), lax.rem(head, p.kv_heads), tile * block_kv

    def load(refs, program):
        queries, scratch = queries_of(refs), refs.scratch

        def load_tile(i, step):
            b, g, start = tile_of(program, i)
            for w in range(consumers):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(scratch.k_empty.at[w]))
                own = (b, pl.ds(start + w * ROWS, ROWS), g)
                plgpu.copy_gmem_to_smem(refs.inputs.k.at[own], scratch.k.at[w], scratch.k_full.at[w])
                plgpu.copy_gmem_to_smem(refs.inputs.v.at[own], scratch.v.at[w], scratch.k_full.at[w])
            return queries.load(step, b, g, start)

        queries.ring.drain(schedule.each(program, load_tile, jnp.int32(0)))
        for w in range(consumers):
            plgpu.barrier_wait(scratch.k_empty.at[w])

    def compute(refs, program, warpgroup, accumulators):
        queries, scratch, outputs = queries_of(refs), refs.scratch, refs.outputs
        decays, buffers = refs.inputs.decay, queries.buffers

        def differentiate_tile(i, step):
            def place():
                """Where this warpgroup's keys are."""
                b, g, start = tile_of(program, anew(i))
                w = anew(warpgroup)
                return Place(b, g, start, start + w * ROWS, w)

            at = place()
            w = at.warpgroup
            plgpu.barrier_wait(scratch.k_full.at[w])
            key = plgpu.load(scratch.k.at[w], layout=TILE) * p.key_power
            if tiles.resident:
                value = plgpu.load(scratch.v.at[w], layout=TILE)
                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch.k_empty.at[w])
            else:
                scratch.k[w] = key
                plgpu.commit_smem()

            def own_operands():
                """Of the products with a tile of queries."""
                if tiles.resident:
                    return key, value
                w = anew(warpgroup)
                return scratch.k.at[w], scratch.v.at[w]

            def load_rows(ref, at):
                """Loaded where it is used, not kept: registers are scarce in the loop."""
                return plgpu.load(ref.at[at.b, at.g, pl.ds(at.first_row, ROWS)], layout=ROW, optimized=False)

            suffix = load_rows(decays.suffix, at) if decay is not None and score == "exp" else None

            def factor_from(s, logit, row, seen):
                """What multiplies the score of each pair; for `exp` the whole weight."""
                terms = [s * p.logit_scale] if score == "exp" else []
                terms += [] if row is None else [rows(row, s.shape)]
                terms += [] if logit is None else [logit]
                if not terms:
                    return None
                total = functools.reduce(operator.add, terms)
                if score == "exp" and p.normalize:
                    total = jnp.minimum(total, 0.0)  # logits of 2^60 differ by more than they are apart
                return jnp.exp2(total if seen is None else jnp.where(seen, total, -jnp.inf))

            def differentiate(dk, dv):
                def tile(at, slot, release, columns_of, beside, carry):
                    for begin in range(0, tiles.streamed, tiles.columns):
                        part = pl.ds(begin, tiles.columns)
                        released = release if begin == 0 else lambda: None
                        carry = differentiate_part(at, slot, part, released, columns_of, beside, carry)
                    return carry

                def differentiate_part(at, slot, part, release, columns_of, beside, carry):
                    early = None if lean else columns_of(part, tiles.columns)

                    def weigh(products):
                        s = products.take(0)
                        release()
                        t = products.take(1) if lean else None
                        logit, delta, seen = early or columns_of(part, tiles.columns)
                        t = t - delta if lean and delta is not None else t
                        factor = logit
                        if beside and decay is not None:
                            row = -load_rows(decays.prefix, at)
                            factor = factor_from(s, logit, row, seen)
                        elif score == "exp":
                            factor = factor_from(s, logit, suffix, seen)
                        slope = slope_of(score, s, factor)
                        weights = factor if score == "exp" else s if slope is None else slope * s
                        if seen is not None and factor is logit:
                            weights = jnp.where(seen, weights, 0.0)
                        if not lean:
                            products.add(dv, weights.astype(jnp.bfloat16), buffers.dy.at[slot, part])
                            t = products.take(1)
                        ds = t if slope is None else slope * t
                        if seen is not None and factor is logit:
                            ds = jnp.where(seen, ds, 0.0)
                        if lean:
                            products.add(dv, weights.astype(jnp.bfloat16), buffers.dy.at[slot, part])
                        products.add(dk, ds.astype(jnp.bfloat16), buffers.q.at[slot, part])
                        if decay is None:
                            return carry
                        return (carry[0] + (ds if score == "exp" else ds * s).sum(axis=1),)

                    start = None if lean or early[1] is None else -early[1]
                    key, value = own_operands()
                    return accumulators.multiply(
                        weigh,
                        (key, buffers.q.at[slot, part].T, None),
                        (value, buffers.dy.at[slot, part].T, start),
                    )

                def turn(carry):
                    """From here on weights count from the key itself, no longer from the end of its tile."""
                    if decay is None or score == "exp":
                        return carry
                    suffix = load_rows(decays.suffix, place())
                    factor = jnp.where(suffix >= SMALLEST_DECAY, jnp.exp2(suffix), 0.0)

                    def decayed(sums, factor):
                        # Where it is 0 the sums may be infinite, or no number.
                        return jnp.where(factor > 0, sums * factor, 0.0)

                    dk[...] = decayed(read(dk), rows(factor, dk.shape))
                    dv[...] = decayed(read(dv), rows(factor, dv.shape))
                    return (decayed(carry[0], factor),)

                zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                step_and_carry = queries.walk(step, place, tile, turn, (zero,))
                return step_and_carry, read(dk), read(dv)

            (step, (sums,)), dk, dv = accumulators.accumulate(differentiate, (ROWS, p.head_dim), (ROWS, p.head_dim))
            b, g, _, first_row, w = place()
            own = pl.ds(first_row, ROWS)
            if not tiles.resident:
                plgpu.barrier_arrive(scratch.k_empty.at[w])
            if decay is not None:
                outputs.sums[b, g, own] = sums * weight_scale
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.dk[w] = (dk * slope_scale).astype(jnp.bfloat16)
            scratch.dv[w] = (dv * weight_scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch.dk.at[w], outputs.dk.at[b, own, g])
            plgpu.copy_smem_to_gmem(scratch.dv.at[w], outputs.dv.at[b, own, g])
            return step

        queries.ring.release(schedule.each(program, differentiate_tile, jnp.int32(0)) - 1)
        plgpu.wait_smem_to_gmem(0)

    dim = p.head_dim
    depth = min(64, tiles.columns)
    own = operand((consumers, ROWS, dim), depth)
    has_logit, padded = logit is not None, p.tiles(block_kv) * block_kv
    sums = None if decay is None else jax.ShapeDtypeStruct((p.batch, p.kv_heads, padded), jnp.float32)
    dk, dv, sums = launch_persistent(
        load,
        compute,
        Inputs(q, k, v, dy, logit, delta, decay, last_visible),
        Outputs(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), sums),
        {
            "k": own,
            "v": own,
            "dk": own,
            "dv": own,
            "queries": QueryBuffers.types(p, tiles.streamed, tiles.num_stages, has_logit, consumers, depth),
            "k_full": plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
            "k_empty": plgpu.Barrier(num_barriers=consumers),
        },
        roles=tiles.roles,
        programs=schedule.programs,
        accumulators=Scratch.types(p.interpret, consumers, ((ROWS, dim), (ROWS, dim)), max(tiles.streamed, dim), depth),
        name=f"{score}_backward_keys",
    )
    return (dk, dv) if sums is None else (dk, dv, sums)
