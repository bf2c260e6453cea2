"""The gradients of the keys and values, and the column sums that the gradient of the decays needs."""

import functools
import operator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, Scratch, anew, operand, read, rows
from pallas_kernels.quadratic.operands import SMALLEST_DECAY, Decay, Problem, slope_of
from pallas_kernels.quadratic.queries import ROWS, Place, Queries, QueryBuffers
from pallas_kernels.quadratic.tuning import Tiles
from pallas_kernels.schedule import Schedule


def backward_keys(
    problem: Problem, tiles: Tiles, programs: int, q, k, v, dy, logit, delta, decay: Decay | None, last_visible
):
    """dk [B, T, G, K], dv and, with a decay, sum_i W_ij [B, G, T padded to block_kv]; W as in `operands.slope_of`.

    Everything is transposed: a program takes tiles of block_kv keys, 64 to each consumer warpgroup, past the queries
    that see them. logit and delta are as in `Queries`.
    """
    p, block_kv = problem, tiles.own
    consumers, producer = tiles.consumers, tiles.consumers
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
    extra = tuple(x for x in (logit, delta, *(decay or ()), last_visible) if x is not None)

    def body(q_ref, k_ref, v_ref, dy_ref, *refs):
        refs = list(refs)
        logit_ref = refs.pop(0) if logit is not None else None
        delta_ref = refs.pop(0) if delta is not None else None
        decay_ref = Decay(*(refs.pop(0) for _ in Decay._fields)) if decay is not None else None
        last_ref = refs.pop(0) if last_visible is not None else None
        dk_ref, dv_ref = refs.pop(0), refs.pop(0)
        sums_ref = refs.pop(0) if decay is not None else None
        k_s, v_s, dk_s, dv_s, buffers, k_full, k_empty, done, scratch_buffers = refs
        queries = Queries(
            p,
            tiles.streamed,
            block_kv,
            tiles.num_stages,
            q_ref,
            dy_ref,
            logit_ref,
            delta_ref,
            decay_ref.total if decay is not None else None,
            last_ref,
            buffers,
        )
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

        def tile_of(i):
            """Batch entry, key/value head and first key of the program's i-th tile."""
            head, tile = schedule.tile(program, i)
            return lax.div(head, p.kv_heads), lax.rem(head, p.kv_heads), tile * block_kv

        @pl.when(warpgroup == producer)
        def _load():
            plgpu.set_max_registers(tiles.producer_registers, action="decrease")

            def load_tile(i, step):
                b, g, start = tile_of(i)
                for w in range(consumers):
                    pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(k_empty.at[w]))
                    own = (b, pl.ds(start + w * ROWS, ROWS), g)
                    plgpu.copy_gmem_to_smem(k_ref.at[own], k_s.at[w], k_full.at[w])
                    plgpu.copy_gmem_to_smem(v_ref.at[own], v_s.at[w], k_full.at[w])
                return queries.load(step, b, g, start)

            queries.ring.drain(schedule.each(program, load_tile, jnp.int32(0)))
            for w in range(consumers):
                plgpu.barrier_wait(k_empty.at[w])

        @pl.when(warpgroup < producer)
        def _differentiate():
            plgpu.set_max_registers(tiles.consumer_registers, action="increase")
            scratch = Scratch.of(scratch_buffers, warpgroup)

            def differentiate_tile(i, step):
                def place():
                    """Where this warpgroup's keys are."""
                    b, g, start = tile_of(anew(i))
                    w = anew(warpgroup)
                    return Place(b, g, start, start + w * ROWS, w)

                at = place()
                w = at.warpgroup
                plgpu.barrier_wait(k_full.at[w])
                key = plgpu.load(k_s.at[w], layout=TILE) * p.key_power
                if tiles.resident:
                    value = plgpu.load(v_s.at[w], layout=TILE)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(k_empty.at[w])
                else:
                    k_s[w] = key
                    plgpu.commit_smem()

                def own_operands():
                    """Of the products with a tile of queries."""
                    if tiles.resident:
                        return key, value
                    w = anew(warpgroup)
                    return k_s.at[w], v_s.at[w]

                def load_rows(ref, at):
                    """Loaded where it is used, not kept: registers are scarce in the loop."""
                    return plgpu.load(ref.at[at.b, at.g, pl.ds(at.first_row, ROWS)], layout=ROW, optimized=False)

                suffix = load_rows(decay_ref.suffix, at) if decay is not None and score == "exp" else None

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
                                row = -load_rows(decay_ref.prefix, at)
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
                        return scratch.multiply(
                            weigh,
                            (key, buffers.q.at[slot, part].T, None),
                            (value, buffers.dy.at[slot, part].T, start),
                        )

                    def turn(carry):
                        """From here on weights count from the key itself, no longer from the end of its tile."""
                        if decay is None or score == "exp":
                            return carry
                        suffix = load_rows(decay_ref.suffix, place())
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

                (step, (sums,)), dk, dv = scratch.accumulate(differentiate, (ROWS, p.head_dim), (ROWS, p.head_dim))
                b, g, _, first_row, w = place()
                own = pl.ds(first_row, ROWS)
                if not tiles.resident:
                    plgpu.barrier_arrive(k_empty.at[w])
                if decay is not None:
                    sums_ref[b, g, own] = sums * weight_scale
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dk_s[w] = (dk * slope_scale).astype(jnp.bfloat16)
                dv_s[w] = (dv * weight_scale).astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dk_s.at[w], dk_ref.at[b, own, g])
                plgpu.copy_smem_to_gmem(dv_s.at[w], dv_ref.at[b, own, g])
                return step

            queries.ring.release(schedule.each(program, differentiate_tile, jnp.int32(0)) - 1)
            plgpu.wait_smem_to_gmem(0)

        # A warpgroup that leaves while another one multiplies can fault.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    dim = p.head_dim
    depth = min(64, tiles.columns)
    own = operand((consumers, ROWS, dim), depth)
    scratch_types = [
        own,
        own,
        own,
        own,
        QueryBuffers.types(p, tiles.streamed, tiles.num_stages, logit is not None, consumers, depth),
        plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=consumers),
        plgpu.Barrier(num_arrivals=consumers + 1),
        Scratch.types(p.interpret, consumers, ((ROWS, dim), (ROWS, dim)), max(tiles.streamed, dim), depth),
    ]
    outputs = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)]
    if decay is not None:
        padded = p.tiles(block_kv) * block_kv
        outputs.append(jax.ShapeDtypeStruct((p.batch, p.kv_heads, padded), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch_types,
        grid=(schedule.programs,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=f"{score}_backward_keys",
    )
    return kernel(q, k, v, dy, *extra)
