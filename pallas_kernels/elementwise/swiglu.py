"""The backward pass of a gated MLP between its products."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import in_32_bits
from pallas_kernels.elementwise.vectors import load, piece_of, wide


def unsupported(gate_up: jax.Array) -> str | None:
    """Why there is no kernel for gate_up [..., 2, F], or None."""
    if gate_up.dtype != jnp.bfloat16:
        return f"it is for bfloat16, not {gate_up.dtype}"
    if piece_of(gate_up.shape[-1]) is None:
        return f"it needs a hidden width that is a multiple of 512, not {gate_up.shape[-1]}"
    return None


@in_32_bits
@jax.jit
def swiglu_backward(gate_up, dh):
    """The gradient of h = silu(gate) * up, and h again, which the gradient of the next product's weights needs.

    With s = sigmoid(gate): dgate = dh up s (1 + gate (1 - s)), dup = dh silu(gate). Each program takes a piece of a
    token, and every number is read and written once.

    Args:
      gate_up: [N, 2, F] bfloat16.
      dh: [N, F] bfloat16.

    Returns:
      [N, 2, F] like gate_up, and h [N, F].
    """
    tokens, _, hidden = gate_up.shape
    size = piece_of(hidden)
    per_token = hidden // size

    def body(gate_up_ref, dh_ref, out_ref, h_ref):
        program = lax.axis_index("program")
        t, at = lax.div(program, per_token), pl.ds(lax.rem(program, per_token) * size, size)
        gate, up, dh = wide((load(gate_up_ref, (t, 0), at), load(gate_up_ref, (t, 1), at), load(dh_ref, (t,), at)))
        s = 1 / (1 + jnp.exp(-gate))
        silu = gate * s
        out_ref[t, 0, at] = (dh * up * (s + silu * (1 - s))).astype(out_ref.dtype)
        out_ref[t, 1, at] = (dh * silu).astype(out_ref.dtype)
        h_ref[t, at] = (silu * up).astype(h_ref.dtype)

    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype), jax.ShapeDtypeStruct(dh.shape, dh.dtype)),
        grid=(tokens * per_token,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="swiglu_backward",
    )
    return kernel(gate_up, dh)
