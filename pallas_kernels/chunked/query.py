"""What the tokens of each chunk read from the state before it: N_i = S^T phi(x_i)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import TILE, Scratch, anew, load_vector, operand, read, rows, store
from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, KINDS, TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.rows import CONSUMERS, ROLES, Rows
from pallas_kernels.launch import launch_persistent
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
    p = problem
    halves, states, stages = p.tiles.halves, p.tiles.states, p.tiles.state_stages
    own = Rows(p)
    normalize = normalizer is not None

    def load(refs, program):
        inputs, scratch = refs.inputs, refs.scratch
        ring = Ring(stages, *scratch.ring)

        def load_piece(i, step):
            b, g, c, _, _ = own.place(program, i)
            own.load(program, i, ((inputs.x, scratch.x),), scratch.own_x)
            if normalize:
                slot = ring.claim(step)
                to = scratch.state.at[slot, pl.ds(0, 2)]
                plgpu.copy_gmem_to_smem(inputs.normalizer.at[b, g, c], to, ring.full.at[slot])
                step = step + 1

            def fill(n, _):
                slot = ring.claim(step + n)
                source = inputs.state.at[b, g, c, pl.ds(n * states, states)]
                plgpu.copy_gmem_to_smem(source, scratch.state.at[slot], ring.full.at[slot])

            steps = TILES // states
            lax.fori_loop(0, anew(jnp.int32(steps)), fill, None)
            own.load(program, i, ((inputs.added, scratch.y),), scratch.own_y)
            return step + steps

        ring.drain(own.each(program, load_piece, jnp.int32(0)))
        for w in range(CONSUMERS):
            scratch.own_x.drain(w)
            scratch.own_y.drain(w)

    def compute(refs, program, warpgroup, memory):
        inputs, outputs, scratch = refs
        ring = Ring(stages, *scratch.ring)

        def multiply(i, step):
            place = own.place(program, i)
            b, g, _, h, start = place
            scratch.own_x.receive(warpgroup)
            own_x = []
            for half in range(halves):
                own_x.append(plgpu.load(scratch.x.at[warpgroup, half], layout=TILE) * power)
                store(scratch.x_rows.at[warpgroup, half].T, own_x[half])
            plgpu.commit_smem()
            scratch.own_x.release(warpgroup)

            def feature(half, a):
                return load_vector(scratch.x_rows.at[warpgroup, half, a])

            sums = []
            if normalize:
                slot = ring.receive(step)
                for x in own_x:

                    def times(acc, x=x):
                        memory.add(acc, x, scratch.state.at[slot, 0])
                        memory.add(acc, x, scratch.state.at[slot, 1])
                        return read(acc)

                    zx = memory.accumulate(times, (HEAD_DIM, HEAD_DIM))
                    sums.append(jnp.maximum((zx * x.astype(jnp.float32)).sum(axis=1), 0.0))
                ring.release(step)
                step = step + 1

            def accumulate(*accumulators):
                at = step
                for kind in KINDS:
                    matrices = [_matrix(kind, x) for x in own_x]

                    def add(n, at, kind=kind, matrices=matrices):
                        slot = ring.receive(at)
                        for j in range(states):
                            for half, acc in enumerate(accumulators):
                                i = n * states + j
                                factors = [
                                    rows(feature(half, band.feature + i * band.step), (HEAD_DIM, band.size))
                                    for band in kind.bands
                                ]
                                left = matrices[half] * _beside(factors)
                                memory.add(acc, left, scratch.state.at[slot, j])
                                memory.wait(1)
                        memory.wait(0)
                        ring.release(at)
                        return at + 1

                    at = lax.fori_loop(0, kind.count // states, add, at)
                return at, [read(acc) for acc in accumulators]

            step, numerators = memory.accumulate(accumulate, *[(HEAD_DIM, HEAD_DIM)] * halves)
            scratch.own_y.receive(warpgroup)
            for half, numerator in enumerate(numerators):
                place_of = own.of(start, warpgroup, half)
                y = plgpu.load(scratch.y.at[warpgroup, half], layout=TILE).astype(jnp.float32)
                factor = None
                if weight is not None:
                    factor = load_vector(inputs.weight.at[b, g, place_of])
                    numerator = numerator * rows(factor, numerator.shape)
                if normalize:
                    through = sums[half] if factor is None else sums[half] * factor
                    inside = load_vector(inputs.own_norm.at[b, h, place_of])
                    inside = jnp.exp2(jnp.where(inside == jnp.inf, -jnp.inf, inside))
                    total = inside + through
                    dead = total < floor
                    inverse = jnp.where(dead, 0.0, 1.0 / total)
                    y = y * rows(inside, y.shape) + numerator
                    y = y * rows(inverse, y.shape)
                    outputs.norm[b, h, place_of] = jnp.where(dead, jnp.inf, jnp.log2(total))
                else:
                    y = y + numerator
                scratch.y[warpgroup, half] = y.astype(jnp.bfloat16)
            own.store(place, warpgroup, scratch.y, outputs.y, scratch.own_y)
            return step

        own.each(program, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    tile = operand((CONSUMERS, halves, HEAD_DIM, HEAD_DIM))
    norm = jax.ShapeDtypeStruct(own_norm.shape, jnp.float32) if normalize else None
    y, norm = launch_persistent(
        load,
        compute,
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
    return (y, norm) if normalize else y


def _matrix(kind, x):
    """x with its features b in the order of the rows of the kind's tiles, times how many entries a row stands for."""
    pieces = []
    for band in kind.bands:
        for b in range(band.first, HEAD_DIM, BLOCK):
            piece = x[:, b : b + BLOCK]
            pieces.append(piece if b // BLOCK == band.feature // BLOCK else piece * 2)
    return _beside(pieces)


def _beside(pieces):
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
