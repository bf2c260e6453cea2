"""The forward kernel of quadratic attention: outputs, and the logarithms of the row sums if a gradient needs them."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, Scratch, operand, read, rows
from pallas_kernels.launch import launch_persistent
from pallas_kernels.quadratic.keys import ROWS, KeyBuffers, Keys
from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.quadratic.tuning import Tiles
from pallas_kernels.schedule import Schedule


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


LOWEST = -1e30  # below every logit, and finite: differences of it are no NaN


def forward(
    problem: Problem, tiles: Tiles, programs: int, q, k, v, decay: Decay | None, first_visible, *, save_norm: bool
):
    """y [B, T, H, V] and, if `save_norm`, log2 of the row sums [B, H, T padded to block_q] (+inf where the row is 0).

    A program takes tiles of block_q query rows, 64 to each consumer warpgroup, past the keys that they see, which the
    producer warpgroup loads. A row's sum adds weights in float32; where few keys may be in sight (in masked tiles) it
    adds them as the product with the values sees them, rounded to bfloat16, so that a row with one key is its value.
    """
    p, block_q = problem, tiles.own
    consumers = tiles.consumers
    score, normalize = p.score, p.normalize
    running_max = score == "exp" and normalize
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
                own = pl.ds(start + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(refs.inputs.q.at[b, own, h], scratch.q.at[w], scratch.q_full.at[w])
            return keys.load(step, b, g, start)

        keys.ring.drain(schedule.each(program, load_tile, jnp.int32(0)))
        for w in range(consumers):
            plgpu.barrier_wait(scratch.q_empty.at[w])

    def compute(refs, program, warpgroup, accumulators):
        keys, scratch = Keys.of(p, tiles, refs), refs.scratch
        buffers = keys.buffers

        def attend_tile(i, step):
            b, h, g, start = tile_of(program, i)
            first_row = start + warpgroup * ROWS
            own = pl.ds(first_row, ROWS)
            plgpu.barrier_wait(scratch.q_full.at[warpgroup])
            query = plgpu.load(scratch.q.at[warpgroup], layout=TILE) * p.query_power
            if tiles.resident:
                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch.q_empty.at[warpgroup])
            else:
                scratch.q[warpgroup] = query
                plgpu.commit_smem()
                query = scratch.q.at[warpgroup]
            prefix = None
            if decay is not None:
                prefix = plgpu.load(refs.inputs.decay.prefix.at[b, g, own], layout=ROW, optimized=False)

            def attend(acc):
                def exponential_tile(slot, release, decays_of, mask_of, beside, carry):
                    total, largest = carry
                    everything = pl.ds(0, tiles.streamed), tiles.streamed
                    column = seen = None
                    if mask_of is None:
                        column = decays_of(*everything)  # while the product is on its way
                    s = accumulators.product(query, buffers.k.at[slot].T)
                    release()
                    if mask_of is not None:
                        column, seen = decays_of(*everything), mask_of(*everything)  # registers are scarce
                    logits = s * p.logit_scale
                    if column is not None:
                        logits = logits + column
                        logits = logits + rows(prefix, s.shape) if beside else logits
                    logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
                    if normalize:
                        new = jnp.maximum(largest, logits.max(axis=1))
                        shrink = jnp.exp2(largest - new)
                        total, largest = total * shrink, new
                        acc[...] = read(acc) * rows(shrink, acc.shape)
                        logits = logits - rows(new, s.shape)
                    weights = jnp.exp2(logits)
                    rounded = weights.astype(jnp.bfloat16)
                    total = add_to(total, weights, rounded, seen)
                    accumulators.add(acc, rounded, buffers.v.at[slot])
                    return total, largest

                def power_tile(slot, release, decays_of, mask_of, beside, carry):
                    # A mask and a decay for each pair take registers that a whole tile does not leave.
                    size = tiles.columns if mask_of is None or decay is None else ROWS
                    parts = [pl.ds(begin, size) for begin in range(0, tiles.streamed, size)]
                    factors = [decays_of(part, size) if mask_of is None else None for part in parts]

                    def weigh(products):
                        total, largest = carry
                        for i, (part, factor) in enumerate(zip(parts, factors, strict=True)):
                            s = products.take(i)
                            if i == 0:
                                release()
                            seen = None
                            if mask_of is not None:
                                factor, seen = decays_of(part, size), mask_of(part, size)  # registers are scarce
                            pairwise = factor is not None and beside
                            if pairwise:
                                factor = jnp.exp2(jnp.where(seen, factor + rows(prefix, s.shape), -jnp.inf))
                            weights = s if factor is None else s * factor
                            weights = weights * s if score == "squared" else weights
                            if seen is not None and not pairwise:
                                weights = jnp.where(seen, weights, 0.0)
                            rounded = weights.astype(jnp.bfloat16)
                            products.add(acc, rounded, buffers.v.at[slot, part])
                            total = add_to(total, weights, rounded, seen)
                        return total, largest

                    return accumulators.multiply(weigh, *((query, buffers.k.at[slot, part].T, None) for part in parts))

                def add_to(total, weights, rounded, seen):
                    if not normalize:
                        return total
                    return total + (weights if seen is None else rounded.astype(jnp.float32)).sum(axis=1)

                def turn(carry):
                    """From here on weights count from the row itself, no longer from the start of its tile."""
                    total, largest = carry
                    if decay is None:
                        return carry
                    if running_max:
                        return total, largest + prefix
                    factor = jnp.exp2(prefix)
                    acc[...] = read(acc) * rows(factor, acc.shape)
                    return total * factor, largest

                zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                tile = exponential_tile if score == "exp" else power_tile
                step_and_carry = keys.walk(step, b, start, first_row, tile, turn, (zero, zero + LOWEST))
                return step_and_carry, read(acc)

            (step, (total, largest)), y = accumulators.accumulate(attend, (ROWS, p.head_dim))
            if not tiles.resident:
                plgpu.barrier_arrive(scratch.q_empty.at[warpgroup])
            if normalize:
                dead = total < p.floor
                y = y * rows(jnp.where(dead, 0.0, 1.0 / total), y.shape)
                if save_norm:
                    norm = jnp.log2(total)
                    refs.outputs.norm[b, h, own] = jnp.where(dead, jnp.inf, norm + largest if running_max else norm)
            elif p.output_scale != 1:
                y = y * p.output_scale
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.y[warpgroup] = y.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch.y.at[warpgroup], refs.outputs.y.at[b, own, h])
            return step

        keys.ring.release(schedule.each(program, attend_tile, jnp.int32(0)) - 1)
        plgpu.wait_smem_to_gmem(0)

    dim = p.head_dim
    norm = jax.ShapeDtypeStruct((p.batch, p.heads, p.tiles(block_q) * block_q), jnp.float32) if save_norm else None
    y, norm = launch_persistent(
        load,
        compute,
        Inputs(q, k, v, decay, first_visible),
        Outputs(jax.ShapeDtypeStruct(q.shape, q.dtype), norm),
        {
            "q": operand((consumers, ROWS, dim)),
            "y": operand((consumers, ROWS, dim)),
            "keys": KeyBuffers.types(p, tiles.streamed, tiles.num_stages, decay is not None, consumers),
            "q_full": plgpu.Barrier(num_barriers=consumers),
            "q_empty": plgpu.Barrier(num_barriers=consumers),
        },
        roles=tiles.roles,
        programs=schedule.programs,
        accumulators=Scratch.types(p.interpret, consumers, ((ROWS, dim),), max(tiles.streamed, dim)),
        name=f"{score}_forward",
    )
    return (y, norm) if save_norm else (y,)
