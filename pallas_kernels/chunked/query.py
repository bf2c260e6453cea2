"""What the tokens of each chunk read from the state before it: N_i = S^T phi(x_i)."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import ROW, TILE, Scratch, anew, operand, read, rows, store
from pallas_kernels.chunked.layout import BLOCK, HEAD_DIM, KINDS, TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.rows import Rows
from pallas_kernels.ring import Ring

CONSUMERS = 2


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
    producer = CONSUMERS
    normalize = normalizer is not None

    def body(x_ref, state_ref, added_ref, *refs):
        refs = list(refs)
        weight_ref = refs.pop(0) if weight is not None else None
        normalizer_ref, own_norm_ref = (refs.pop(0), refs.pop(0)) if normalize else (None, None)
        y_ref = refs.pop(0)
        norm_ref = refs.pop(0) if normalize else None
        x_s, x_rows_s, y_s, state_s, barriers, x_full, x_empty, y_full, y_empty, done, scratch_buffers = refs
        ring = Ring(stages, *barriers)
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

        @pl.when(warpgroup == producer)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def load_own(i, source_ref, to, full, empty):
                b, _, _, h, start = own.place(program, i)
                for w in range(CONSUMERS):
                    pl.when(i > 0)(lambda w=w: plgpu.barrier_wait(empty.at[w]))
                    for half in range(halves):
                        source = source_ref.at[b, own.of(start, w, half), h]
                        plgpu.copy_gmem_to_smem(source, to.at[w, half], full.at[w])

            def load(i, step):
                b, g, c, _, _ = own.place(program, i)
                load_own(i, x_ref, x_s, x_full, x_empty)
                if normalize:
                    slot = ring.claim(step)
                    to = state_s.at[slot, pl.ds(0, 2)]
                    plgpu.copy_gmem_to_smem(normalizer_ref.at[b, g, c], to, ring.full.at[slot])
                    step = step + 1

                def fill(n, _):
                    slot = ring.claim(step + n)
                    source = state_ref.at[b, g, c, pl.ds(n * states, states)]
                    plgpu.copy_gmem_to_smem(source, state_s.at[slot], ring.full.at[slot])

                steps = TILES // states
                lax.fori_loop(0, anew(jnp.int32(steps)), fill, None)
                load_own(i, added_ref, y_s, y_full, y_empty)
                return step + steps

            ring.drain(own.each(program, load, jnp.int32(0)))
            for w in range(CONSUMERS):
                plgpu.barrier_wait(x_empty.at[w])
                plgpu.barrier_wait(y_empty.at[w])

        @pl.when(warpgroup < producer)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            scratch = Scratch.of(scratch_buffers, warpgroup)

            def multiply(i, step):
                b, g, _, h, start = own.place(program, i)
                plgpu.barrier_wait(x_full.at[warpgroup])
                own_x = []
                for half in range(halves):
                    own_x.append(plgpu.load(x_s.at[warpgroup, half], layout=TILE) * power)
                    store(x_rows_s.at[warpgroup, half].T, own_x[half])
                plgpu.commit_smem()
                plgpu.barrier_arrive(x_empty.at[warpgroup])

                def feature(half, a):
                    return plgpu.load(x_rows_s.at[warpgroup, half, a], layout=ROW, optimized=False)

                sums = []
                if normalize:
                    slot = ring.receive(step)
                    for x in own_x:

                        def times(acc, x=x):
                            scratch.add(acc, x, state_s.at[slot, 0])
                            scratch.add(acc, x, state_s.at[slot, 1])
                            return read(acc)

                        zx = scratch.accumulate(times, (HEAD_DIM, HEAD_DIM))
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
                                    scratch.add(acc, left, state_s.at[slot, j])
                                    if not p.interpret:
                                        plgpu.wgmma_wait(1)
                            if not p.interpret:
                                plgpu.wgmma_wait(0)
                            ring.release(at)
                            return at + 1

                        at = lax.fori_loop(0, kind.count // states, add, at)
                    return at, [read(acc) for acc in accumulators]

                step, numerators = scratch.accumulate(accumulate, *[(HEAD_DIM, HEAD_DIM)] * halves)
                plgpu.barrier_wait(y_full.at[warpgroup])
                for half, numerator in enumerate(numerators):
                    place_of = own.of(start, warpgroup, half)
                    y = plgpu.load(y_s.at[warpgroup, half], layout=TILE).astype(jnp.float32)
                    factor = None
                    if weight is not None:
                        factor = plgpu.load(weight_ref.at[b, g, place_of], layout=ROW, optimized=False)
                        numerator = numerator * rows(factor, numerator.shape)
                    if normalize:
                        through = sums[half] if factor is None else sums[half] * factor
                        inside = plgpu.load(own_norm_ref.at[b, h, place_of], layout=ROW, optimized=False)
                        inside = jnp.exp2(jnp.where(inside == jnp.inf, -jnp.inf, inside))
                        total = inside + through
                        dead = total < floor
                        inverse = jnp.where(dead, 0.0, 1.0 / total)
                        y = y * rows(inside, y.shape) + numerator
                        y = y * rows(inverse, y.shape)
                        norm_ref[b, h, place_of] = jnp.where(dead, jnp.inf, jnp.log2(total))
                    else:
                        y = y + numerator
                    y_s[warpgroup, half] = y.astype(jnp.bfloat16)
                plgpu.commit_smem()
                for half in range(halves):
                    to = y_ref.at[b, own.of(start, warpgroup, half), h]
                    plgpu.copy_smem_to_gmem(y_s.at[warpgroup, half], to)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(y_empty.at[warpgroup])
                return step

            own.each(program, multiply, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        # A warpgroup that leaves while another one multiplies can fault.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    tile = operand((CONSUMERS, halves, HEAD_DIM, HEAD_DIM))
    outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
    if normalize:
        outputs.append(jax.ShapeDtypeStruct(own_norm.shape, jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=[
            tile,
            plgpu.SMEM((CONSUMERS, halves, HEAD_DIM, HEAD_DIM), jnp.bfloat16),
            tile,
            operand((stages, states, HEAD_DIM, HEAD_DIM)),
            Ring.barriers(stages, arrivals=1, users=CONSUMERS),
            *[plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=n) for n in (halves, 1, halves, 1)],
            plgpu.Barrier(num_arrivals=CONSUMERS + 1),
            Scratch.types(p.interpret, CONSUMERS, ((HEAD_DIM, HEAD_DIM),) * (halves + 1), HEAD_DIM),
        ],
        grid=(own.programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="squared_query",
    )
    optional = [weight, normalizer, own_norm]
    result = kernel(x, state, added, *(array for array in optional if array is not None))
    return result if normalize else result[0]


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
