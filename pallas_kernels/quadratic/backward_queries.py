"""The gradient of the queries, and the row sums that the gradient of the decays needs."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, Scratch, operand, read, rows
from pallas_kernels.quadratic.keys import ROWS, KeyBuffers, Keys
from pallas_kernels.quadratic.operands import Decay, Problem, slope_of
from pallas_kernels.quadratic.tuning import Tiles
from pallas_kernels.schedule import Schedule


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
    consumers, producer = tiles.consumers, tiles.consumers
    score, normalize = p.score, p.normalize
    needs_scores = score != "linear" or decay is not None  # the slope of a linear score is 1
    schedule = Schedule.make(p.batch * p.heads, p.tiles(block_q), 4 * p.tokens * p.head_dim, programs, ascending=True)
    extra = tuple(x for x in (norm, delta, *(decay or ()), first_visible) if x is not None)

    def body(q_ref, k_ref, v_ref, dy_ref, *refs):
        refs = list(refs)
        norm_ref, delta_ref = (refs.pop(0), refs.pop(0)) if normalize else (None, None)
        decay_ref = Decay(*(refs.pop(0) for _ in Decay._fields)) if decay is not None else None
        first_ref = refs.pop(0) if first_visible is not None else None
        dq_ref = refs.pop(0)
        sums_ref = refs.pop(0) if decay is not None else None
        q_s, dy_s, dq_s, buffers, q_full, q_empty, done, scratch_buffers = refs
        keys = Keys(p, block_q, tiles.streamed, tiles.num_stages, k_ref, v_ref, decay_ref, first_ref, buffers)
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

        def tile_of(i):
            """Batch entry, head, key/value head and first row of the program's i-th tile."""
            head, tile = schedule.tile(program, i)
            b, h = lax.div(head, p.heads), lax.rem(head, p.heads)
            return b, h, lax.div(h, p.heads // p.kv_heads), tile * block_q

        @pl.when(warpgroup == producer)
        def _load():
            plgpu.set_max_registers(tiles.producer_registers, action="decrease")

            def load_tile(i, step):
                b, h, g, start = tile_of(i)
                for w in range(consumers):
                    pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(q_empty.at[w]))
                    own = (b, pl.ds(start + w * ROWS, ROWS), h)
                    plgpu.copy_gmem_to_smem(q_ref.at[own], q_s.at[w], q_full.at[w])
                    plgpu.copy_gmem_to_smem(dy_ref.at[own], dy_s.at[w], q_full.at[w])
                return keys.load(step, b, g, start)

            keys.ring.drain(schedule.each(program, load_tile, jnp.int32(0)))
            for w in range(consumers):
                plgpu.barrier_wait(q_empty.at[w])

        @pl.when(warpgroup < producer)
        def _differentiate():
            plgpu.set_max_registers(tiles.consumer_registers, action="increase")
            scratch = Scratch.of(scratch_buffers, warpgroup)

            def differentiate_tile(i, step):
                b, h, g, start = tile_of(i)
                first_row = start + warpgroup * ROWS
                own = pl.ds(first_row, ROWS)

                def load_rows(ref, *index):
                    return plgpu.load(ref.at[*index, own], layout=ROW, optimized=False)

                plgpu.barrier_wait(q_full.at[warpgroup])
                query = plgpu.load(q_s.at[warpgroup], layout=TILE) * p.query_power
                if tiles.resident:
                    dy = plgpu.load(dy_s.at[warpgroup], layout=TILE)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(q_empty.at[warpgroup])
                else:
                    q_s[warpgroup] = query
                    plgpu.commit_smem()
                    query, dy = q_s.at[warpgroup], dy_s.at[warpgroup]
                delta = load_rows(delta_ref, b, h) if normalize else None
                norm = load_rows(norm_ref, b, h) if normalize else None
                prefix = load_rows(decay_ref.prefix, b, g) if decay is not None else None
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
                        return scratch.multiply(weigh, *scores, (dy, buffers.v.at[slot].T, start))

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

                (step, (sums,)), dq = scratch.accumulate(differentiate, (ROWS, p.head_dim))
                if not tiles.resident:
                    plgpu.barrier_arrive(q_empty.at[warpgroup])
                if normalize and score != "exp":
                    inverse = jnp.exp2(-norm)
                    dq, sums = dq * rows(inverse, dq.shape), sums * inverse
                if decay is not None:
                    sums_ref[b, h, own] = sums * p.output_scale
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_s[warpgroup] = (dq * p.gradient_scale).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dq_s.at[warpgroup], dq_ref.at[b, own, h])
                return step

            keys.ring.release(schedule.each(program, differentiate_tile, jnp.int32(0)) - 1)
            plgpu.wait_smem_to_gmem(0)

        # A warpgroup that leaves while another one multiplies can fault.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    dim = p.head_dim
    scratch_types = [
        operand((consumers, ROWS, dim)),
        operand((consumers, ROWS, dim)),
        operand((consumers, ROWS, dim)),
        KeyBuffers.types(p, tiles.streamed, tiles.num_stages, decay is not None, consumers),
        plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=consumers),
        plgpu.Barrier(num_arrivals=consumers + 1),
        Scratch.types(p.interpret, consumers, ((ROWS, dim),), max(tiles.streamed, dim)),
    ]
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if decay is not None:
        padded = p.tiles(block_q) * block_q
        outputs.append(jax.ShapeDtypeStruct((p.batch, p.heads, padded), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch_types,
        grid=(schedule.programs,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=f"{score}_backward_queries",
    )
    return kernel(q, k, v, dy, *extra)
