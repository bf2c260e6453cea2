"""The backward pass of a root mean square norm and of the residual connection around what follows it."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import in_32_bits
from pallas_kernels.elementwise.vectors import load, piece_of, pieces, programs_at_once, wide, zeros
from pallas_kernels.schedule import each_piece

WIDEST = 2048  # channels, of which a thread holds 16


def unsupported(x: jax.Array) -> str | None:
    """Why there is no kernel for x [..., E], or None."""
    if x.dtype != jnp.bfloat16:
        return f"it is for bfloat16, not {x.dtype}"
    if piece_of(x.shape[-1]) is None or x.shape[-1] > WIDEST:
        return f"it needs a width that is a multiple of 512, up to {WIDEST}, not {x.shape[-1]}"
    return None


@in_32_bits
@functools.partial(jax.jit, static_argnames="eps")
def norm_backward(x, scale, dys, dresidual, eps: float):
    """The gradients of (y, x), y = scale * x r with r = 1 / sqrt(mean(x^2) + eps), of which x goes on by itself.

    With dy the sum of `dys` and g = scale * dy: dx = dresidual + r (g - x r mean(g x r)), dscale = sum of dy x r over
    the tokens. A program takes every n-th token, the next one's numbers in flight, and adds up its part of dscale in
    registers.

    Args:
      x: [N, E] bfloat16.
      scale: [E] float32.
      dys: arrays [N, E] bfloat16, one for each product that y goes into.
      dresidual: [N, E] bfloat16, or None for zeros.
      eps: added to the mean.

    Returns:
      dx [N, E] bfloat16, and the parts of dscale [programs, E] float32.
    """
    tokens, width = x.shape
    programs, parts = min(programs_at_once(), tokens), pieces(width)
    read = [x, *dys] if dresidual is None else [x, *dys, dresidual]

    def body(scale_ref, *refs):
        *read_refs, dx_ref, dscale_ref = refs
        program = lax.axis_index("program")
        scale = [load(scale_ref, (), at) for at in parts]

        def load_token(i):
            t = lax.min(program + i * programs, tokens - 1)  # beyond the last, of which nothing is stored
            return [[load(ref, (t,), at) for at in parts] for ref in read_refs]

        def step(i, carry):
            loaded, dscale = carry
            upcoming = load_token(i + 1)
            x, *rest = wide(loaded)
            dy = [sum(terms) for terms in zip(*rest[: len(dys)])]
            g = [a * b for a, b in zip(scale, dy)]
            square = sum(jnp.sum(a * a) for a in x)
            along = sum(jnp.sum(a * b) for a, b in zip(g, x))
            r = lax.rsqrt(square / width + eps)
            back = along * (r * r / width)
            for n, at in enumerate(parts):
                dx = r * (g[n] - x[n] * back)
                if dresidual is not None:
                    dx = rest[-1][n] + dx
                dx_ref[program + i * programs, at] = dx.astype(dx_ref.dtype)
            return upcoming, [total + a * b * r for total, a, b in zip(dscale, dy, x)]

        carry = load_token(0), [zeros(at) for at in parts]
        _, dscale = each_piece(tokens, programs, program, step, carry)
        for at, total in zip(parts, dscale):
            dscale_ref[program, at] = total

    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((programs, width), jnp.float32)),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="norm_backward",
    )
    return kernel(scale, *read)
