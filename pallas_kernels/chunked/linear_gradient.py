"""The gradient of the tokens that read from, or were added to, a state of the linear score: dx_i = S w_i + z."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import TILE, Scratch, columns, operand, read, rows
from pallas_kernels.chunked.linear_rows import ROWS, Place, programs_of
from pallas_kernels.chunked.problem import Problem


@functools.partial(jax.jit, static_argnames=("problem", "want_sums"))
def gradient(problem: Problem, x, w, weight, state, added, *, normalizer=None, factor=None, want_sums: bool = False):
    """added + dx, with dx_i = weight_i S_c w_i + factor_i z_c and S_c, z_c the state of the token's chunk and group.

    Args:
      problem: sizes; its heads are those of x.
      x: [B, T, H, K] bfloat16; only the sums below need it.
      w: [B, T, H, V] bfloat16.
      weight: [B, H, T] float32; None is 1.
      state: [B, G, N, K, V] bfloat16, V = K = 64 or 128.
      added: [B, T, H, K] bfloat16.
      normalizer: z [B, G, N, K] float32.
      factor: [B, H, T] float32; None is 1.
      want_sums: whether to return the sums below.

    Returns:
      [B, T, H, K] bfloat16, and if `want_sums` <x_i, dx_i> [B, H, T] float32.
    """
    p, dim = problem, w.shape[-1]
    arrays = {"x": x if want_sums else None, "weight": weight, "normalizer": normalizer, "factor": factor}
    arrays = {name: array for name, array in arrays.items() if array is not None}

    def body(w_ref, state_ref, added_ref, *refs):
        inputs, refs = dict(zip(arrays, refs)), refs[len(arrays) :]
        dx_ref, refs = refs[0], refs[1:]
        sums_ref, refs = (refs[0], refs[1:]) if want_sums else (None, refs)
        w_s, x_s, state_s, y_s, full, scratch_buffers = refs
        at, scratch = Place.of(p, lax.axis_index("program")), Scratch.of(scratch_buffers, 0)
        tiles = ((w_ref, w_s), (added_ref, y_s), *(((inputs["x"], x_s),) if want_sums else ()))
        at.load(tiles, state_ref, state_s, full)

        def multiply(acc):
            scratch.add(acc, plgpu.load(w_s, layout=TILE), state_s.T)
            return read(acc)

        dx = scratch.accumulate(multiply, (ROWS, dim))
        if weight is not None:
            dx = dx * rows(at.vector(inputs["weight"], at.h), dx.shape)
        if normalizer is not None:
            z = columns(at.of_chunk(inputs["normalizer"]), dx.shape)
            dx = dx + (z if factor is None else z * rows(at.vector(inputs["factor"], at.h), dx.shape))
        if want_sums:
            x = plgpu.load(x_s, layout=TILE).astype(jnp.float32)
            sums_ref[at.b, at.h, at.rows] = (x * dx).sum(axis=1)
        at.store(plgpu.load(y_s, layout=TILE).astype(jnp.float32) + dx, y_s, dx_ref)

    outputs = [jax.ShapeDtypeStruct(added.shape, added.dtype)]
    if want_sums:
        outputs.append(jax.ShapeDtypeStruct((p.batch, p.heads, p.tokens), jnp.float32))
    tile = operand((ROWS, dim))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=[
            tile,
            tile,
            operand((dim, dim)),
            tile,
            plgpu.Barrier(num_arrivals=4 if want_sums else 3),
            Scratch.types(p.interpret, 1, ((ROWS, dim),) * 2, dim),
        ],
        grid=(programs_of(p),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="linear_gradient",
    )
    return kernel(w, state, added, *arrays.values())
