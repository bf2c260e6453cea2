"""What the tokens of each chunk read from the state of the linear score before it: N_i = S^T x_i."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import TILE, Scratch, columns, operand, read, rows
from pallas_kernels.chunked.linear_rows import ROWS, Place, programs_of
from pallas_kernels.chunked.problem import Problem


@functools.partial(jax.jit, static_argnames=("problem", "power", "floor"))
def query(problem: Problem, x, state, weight, added, *, power: float = 1.0, normalizer=None, own_norm=None, floor=0.0):
    """added + weight N, with N_i = S_c^T (power x_i) and S_c the state of the token's chunk and group.

    With a normaliser, weights are divided by their sum: added is a quotient whose denominator n has log2 n = own_norm,
    and the result is (n added + weight N) / (n + weight n'), n'_i = <z_c, power x_i> in float32 and at least 0; where
    the denominator is below `floor`, 0.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, K] bfloat16.
      state: [B, G, N, K, V] bfloat16, V = K = 64 or 128.
      weight: [B, G, T] float32; None is 1.
      added: [B, T, H, V] bfloat16.
      power: a power of two.
      normalizer: z [B, G, N, K] float32.
      own_norm: [B, H, T] float32.
      floor: for denominators.

    Returns:
      [B, T, H, V] bfloat16, and with a normaliser log2 of the denominators [B, H, T] float32, +inf below `floor`.
    """
    p, dim = problem, x.shape[-1]
    normalize = normalizer is not None

    def body(x_ref, state_ref, added_ref, *refs):
        refs = list(refs)
        weight_ref = refs.pop(0) if weight is not None else None
        normalizer_ref, own_norm_ref = (refs.pop(0), refs.pop(0)) if normalize else (None, None)
        y_ref = refs.pop(0)
        norm_ref = refs.pop(0) if normalize else None
        x_s, state_s, y_s, full, scratch_buffers = refs
        at, scratch = Place.of(p, lax.axis_index("program")), Scratch.of(scratch_buffers, 0)
        at.load(((x_ref, x_s), (added_ref, y_s)), state_ref, state_s, full)

        left = plgpu.load(x_s, layout=TILE) * power

        def multiply(acc):
            scratch.add(acc, left, state_s)
            return read(acc)

        y = scratch.accumulate(multiply, (ROWS, dim))
        through = None
        if weight is not None:
            through = at.vector(weight_ref, at.g)
            y = y * rows(through, y.shape)
        inside = plgpu.load(y_s, layout=TILE).astype(jnp.float32)
        if normalize:
            read_norm = (left.astype(jnp.float32) * columns(at.of_chunk(normalizer_ref), left.shape)).sum(axis=1)
            read_norm = jnp.maximum(read_norm, 0.0)
            read_norm = read_norm if through is None else read_norm * through
            norm = at.vector(own_norm_ref, at.h)
            norm = jnp.exp2(jnp.where(norm == jnp.inf, -jnp.inf, norm))
            total = norm + read_norm
            dead = total < floor
            y = (inside * rows(norm, y.shape) + y) * rows(jnp.where(dead, 0.0, 1.0 / total), y.shape)
            norm_ref[at.b, at.h, at.rows] = jnp.where(dead, jnp.inf, jnp.log2(total))
        else:
            y = inside + y
        at.store(y, y_s, y_ref)

    outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
    if normalize:
        outputs.append(jax.ShapeDtypeStruct(own_norm.shape, jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=[
            operand((ROWS, dim)),
            operand((dim, dim)),
            operand((ROWS, dim)),
            plgpu.Barrier(num_arrivals=3),
            Scratch.types(p.interpret, 1, ((ROWS, dim),) * 2, dim),
        ],
        grid=(programs_of(p),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_query",
    )
    result = kernel(x, state, added, *(array for array in (weight, normalizer, own_norm) if array is not None))
    return result if normalize else result[0]
