"""The backward pass of the convolutions over queries, keys and values."""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunked.problem import split_index
from pallas_kernels.device import in_32_bits
from pallas_kernels.elementwise.vectors import load, piece_of, programs_at_once, wide, zeros
from pallas_kernels.schedule import each_piece

WIDEST = 4  # taps, whose gradients are in registers
BLOCK = 16  # tokens that a program takes at a time


def unsupported(x: jax.Array, kernel: jax.Array) -> str | None:
    """Why there is no kernel for x [B, T, P, ...channels] and kernel [W, P, ...channels], or None."""
    channels = math.prod(x.shape[3:])
    if x.dtype != jnp.bfloat16:
        return f"it is for bfloat16, not {x.dtype}"
    if piece_of(channels) is None:
        return f"it needs a number of channels that is a multiple of 512, not {channels}"
    if not 2 <= kernel.shape[0] <= WIDEST:
        return f"it is for 2 to {WIDEST} taps, not {kernel.shape[0]}"
    return None


@in_32_bits
@jax.jit
def convolution_backward(x, kernel, continues, *dy):
    """The gradients of y_t = bias + sum_i kernel[W - 1 - i] x_{t - i}, for several y, each of its own part of x.

    With d_{t, i} = dy_{t + i} where token t + i is in t's segment, and 0 elsewhere:

        dx_t = sum_i kernel[W - 1 - i] d_{t, i}, dkernel[W - 1 - i] = sum_t x_t d_{t, i}, dbias = sum_t d_{t, 0}

    A program goes backwards through a block of tokens after the other, of some channels of one part, with the last
    W - 1 rows d in registers, and adds up its share of the sums there.

    Args:
      x: [B, T, P, C] bfloat16, P parts.
      kernel: [W, P, C] bfloat16.
      continues: [B, T] float32, 1 where a token is in the segment of the token before it, else 0.
      dy: P arrays [B, T, C] bfloat16.

    Returns:
      dx like x, and the programs' parts of dkernel and dbias, [programs, W + 1, P, C] float32, the bias last.
    """
    batch, tokens, parts, channels = x.shape
    width, size = len(kernel), piece_of(channels)
    blocks = -(-tokens // BLOCK)
    columns = parts * (channels // size)
    programs = min(-(-programs_at_once() // columns), batch * blocks)

    def body(x_ref, kernel_ref, continues_ref, *refs):
        *dy_refs, dx_ref, sums_ref = refs
        program = lax.axis_index("program")

        def run(part, dy_ref):
            at = pl.ds(lax.axis_index("piece") * size, size)
            taps = wide([load(kernel_ref, (width - 1 - i, part), at) for i in range(width)])

            def load_token(b, t):
                return load(x_ref, (b, t, part), at), load(dy_ref, (b, t), at)

            def later(b, t, dy, after):
                """[d_{t - 1, 1}, ..., d_{t - 1, W - 1}] of dy_t and [d_{t, 1}, ..., d_{t, W - 1}]."""
                return [d * continues_ref[b, t] for d in (dy, *after[:-1])]

            def block(i, sums):
                b, n = split_index(program + i * programs, blocks)
                start = n * BLOCK
                end = lax.min(start + BLOCK, tokens)
                after = [zeros(at)] * (width - 1)
                for distance in reversed(range(width - 1)):
                    t = lax.min(end + distance, tokens - 1)
                    inside = (end + distance < tokens).astype(jnp.float32)
                    after = later(b, t, wide(load(dy_ref, (b, t), at)) * inside, after)

                def step(j, carry):
                    loaded, after, sums = carry
                    t = end - 1 - j
                    upcoming = load_token(b, lax.max(t - 1, start))
                    x, dy = wide(loaded)
                    d = [dy, *after]
                    dx_ref[b, t, part, at] = sum(tap * d_i for tap, d_i in zip(taps, d)).astype(dx_ref.dtype)
                    sums = [total + x * d_i for total, d_i in zip(sums, d)] + [sums[-1] + dy]
                    return upcoming, later(b, t, dy, after), sums

                return lax.fori_loop(0, end - start, step, (load_token(b, end - 1), after, sums))[2]

            sums = [zeros(at)] * (width + 1)
            *dtaps, dbias = each_piece(batch * blocks, programs, program, block, sums)
            for row, total in enumerate([*reversed(dtaps), dbias]):
                sums_ref[program, row, part, at] = total

        for part, dy_ref in enumerate(dy_refs):
            pl.when(lax.axis_index("part") == part)(lambda part=part, dy_ref=dy_ref: run(part, dy_ref))

    call = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, width + 1, parts, channels), jnp.float32),
        ),
        grid=(channels // size, parts, programs),
        grid_names=("piece", "part", "program"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="convolution_backward",
    )
    return call(x, kernel, continues, *dy)
