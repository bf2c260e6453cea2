"""The gradient of the queries, and the row sums that the gradient of the decays needs."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, Scratch, operand, read, rows
from pallas_kernels.launch import launch_persistent
from pallas_kernels.quadratic.keys import ROWS, KeyBuffers, Keys
from pallas_kernels.quadratic.operands import Decay, Problem, slope_of
from pallas_kernels.quadratic.tuning import Tiles
from pallas_kernels.schedule import Schedule


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
    p, block_q = problem, tiles.own
    consumers = tiles.consumers
    score, normalize = p.score, p.normalize
    needs_scores = score != "linear" or decay is not None  # the slope of a linear score is 1
    schedule = Schedule.make(p.batch * p.heads, p.tiles(block_q), 4 * p.tokens * p.head_dim, programs, ascending=True)

    def tile_of(program, i):
        """Batch entry, head, key/value head and first row of the program's i-th tile."""
        head, tile = schedule.tile(program, i)
        b, h = lax.div(head, p.heads), lax.rem(head, p.heads)
        return b, h, lax.div(h, p.heads // p.kv_heads), tile * block_q

    def load(refs, program):
        keys, scratch = Keys.of(p, tiles, refs), refs.scratch

        def load_tile(i, step):
            b, h, g, start = tile_of(program, i)
            for w in range(consumers):
                pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(scratch.q_empty.at[w]))
                own = (b, pl.ds(start + w * ROWS, ROWS), h)
                plgpu.copy_gmem_to_smem(refs.inputs.q.at[own], scratch.q.at[w], scratch.q_full.at[w])
                plgpu.copy_gmem_to_smem(refs.inputs.dy.at[own], scratch.dy.at[w], scratch.q_full.at[w])
            return keys.load(step, b, g, start)

        keys.ring.drain(schedule.each(program, load_tile, jnp.int32(0)))
        for w in range(consumers):
            plgpu.barrier_wait(scratch.q_empty.at[w])

    def compute(refs, program, warpgroup, accumulators):
        keys, scratch, inputs = Keys.of(p, tiles, refs), refs.scratch, refs.inputs
        buffers = keys.buffers

        def differentiate_tile(i, step):
            b, h, g, start = tile_of(program, i)
            first_row = start + warpgroup * ROWS
            own = pl.ds(first_row, ROWS)

            def load_rows(ref, *index):
                return plgpu.load(ref.at[*index, own], layout=ROW, optimized=False)

            plgpu.barrier_wait(scratch.q_full.at[warpgroup])
            query = plgpu.load(scratch.q.at[warpgroup], layout=TILE) * p.query_power
            if tiles.resident:
                dy = plgpu.load(scratch.dy.at[warpgroup], layout=TILE)
                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch.q_empty.at[warpgroup])
            else:
                scratch.q[warpgroup] = query
                plgpu.commit_smem()
                query, dy = scratch.q.at[warpgroup], scratch.dy.at[warpgroup]
            delta = load_rows(inputs.delta, b, h) if normalize else None
            norm = load_rows(inputs.norm, b, h) if normalize else None
            prefix = load_rows(inputs.decay.prefix, b, g) if decay is not None else None
            # What the logit (exp) has of the row itself.
            row_logit = None if norm is None else -norm
            row_logit = row_logit if prefix is None else prefix if norm is None else prefix - norm

            def differentiate(acc):
                def tile(slot, release, decays_of, mask_of, beside, carry):
                    everything = pl.ds(0, tiles.streamed), tiles.streamed
                    column = decays_of(*everything)
                    start = rows(-delta, (ROWS, tiles.streamed)) if normalize and not late_delta else None

                    def weigh(products):
                        s = products.take(0) if needs_scores else None
                        if needs_scores:
                            release()
                        seen = None if mask_of is None else mask_of(*everything)
                        factor, pairwise = column, score == "exp"
                        if score == "exp":
                            factor = s * p.logit_scale
                            factor = factor if column is None else factor + column
                            factor = factor if row_logit is None else factor + rows(row_logit, s.shape)
                        elif column is not None and beside:
                            factor, pairwise = column + rows(prefix, s.shape), True
                        if score == "exp" and normalize:
                            factor = jnp.minimum(factor, 0.0)  # logits of 2^60 differ by more than they are apart
                        if pairwise:
                            factor = jnp.exp2(factor if seen is None else jnp.where(seen, factor, -jnp.inf))
                        slope = slope_of(score, s, factor)
                        ds = products.take(1 if needs_scores else 0)
                        if not needs_scores:
                            release()
                        ds = ds - rows(delta, ds.shape) if normalize and late_delta else ds
                        ds = ds if slope is None else slope * ds
                        if seen is not None and not pairwise:
                            ds = jnp.where(seen, ds, 0.0)
                        products.add(acc, ds.astype(jnp.bfloat16), buffers.k.at[slot])
                        if decay is None:
                            return carry
                        return (carry[0] + (ds if score == "exp" else ds * s).sum(axis=1),)

                    scores = ((query, buffers.k.at[slot].T, None),) if needs_scores else ()
                    return accumulators.multiply(weigh, *scores, (dy, buffers.v.at[slot].T, start))

                def turn(carry):
                    """From here on weights count from the row itself, no longer from the start of its tile."""
                    if decay is None or score == "exp":
                        return carry
                    factor = jnp.exp2(prefix)
                    acc[...] = read(acc) * rows(factor, acc.shape)
                    return (carry[0] * factor,)

                zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                step_and_carry = keys.walk(step, b, start, first_row, tile, turn, (zero,))
                return step_and_carry, read(acc)

            (step, (sums,)), dq = accumulators.accumulate(differentiate, (ROWS, p.head_dim))
            if not tiles.resident:
                plgpu.barrier_arrive(scratch.q_empty.at[warpgroup])
            if normalize and score != "exp":
                inverse = jnp.exp2(-norm)
                dq, sums = dq * rows(inverse, dq.shape), sums * inverse
            if decay is not None:
                refs.outputs.sums[b, h, own] = sums * p.output_scale
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.dq[warpgroup] = (dq * p.gradient_scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch.dq.at[warpgroup], refs.outputs.dq.at[b, own, h])
            return step

        keys.ring.release(schedule.each(program, differentiate_tile, jnp.int32(0)) - 1)
        plgpu.wait_smem_to_gmem(0)

    dim = p.head_dim
    sums = None if decay is None else jax.ShapeDtypeStruct((p.batch, p.heads, p.tiles(block_q) * block_q), jnp.float32)
    dq, sums = launch_persistent(
        load,
        compute,
        Inputs(q, k, v, dy, norm, delta, decay, first_visible),
        Outputs(jax.ShapeDtypeStruct(q.shape, q.dtype), sums),
        {
            "q": operand((consumers, ROWS, dim)),
            "dy": operand((consumers, ROWS, dim)),
            "dq": operand((consumers, ROWS, dim)),
            "keys": KeyBuffers.types(p, tiles.streamed, tiles.num_stages, decay is not None, consumers),
            "q_full": plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
            "q_empty": plgpu.Barrier(num_barriers=consumers),
        },
        roles=tiles.roles,
        programs=schedule.programs,
        accumulators=Scratch.types(p.interpret, consumers, ((ROWS, dim),), max(tiles.streamed, dim)),
        name=f"{score}_backward_queries",
    )
    return (dq,) if sums is None else (dq, sums)
