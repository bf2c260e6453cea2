"""The products of a gated MLP and what stands between them."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.shapes import Array, Float


def gated_product(
    gate_up: Float[Array, "B T 2 F"], kernel: Float[Array, "F E"], elementwise: Elementwise
) -> Float[Array, "B T E"]:
    """(silu(gate) * up) W, whose backward pass is a kernel: `can_gate` says whether there is one.

    Args:
      gate_up: [B, T, 2, F], gate and up side by side, so that one product makes both and takes both gradients.
      kernel: W [F, E], of the same dtype.
      elementwise: the kernels.
    """
    kernels, specs = _kernels(gate_up, elementwise)

    def backward(gate_up, dh):
        *rows, _, hidden = gate_up.shape
        out, h = kernels.swiglu_backward(gate_up.reshape(-1, 2, hidden), dh.reshape(-1, hidden))
        return out.reshape(gate_up.shape), h.reshape(*rows, hidden)

    return _gated_product(gate_up, kernel, elementwise.shard(backward, specs, specs))


def can_gate(gate_up: jax.ShapeDtypeStruct, elementwise: Elementwise) -> bool:
    """Whether there is a kernel for the backward pass of `gated_product`."""
    return _kernels(gate_up, elementwise)[0] is not None


def _kernels(gate_up, elementwise: Elementwise):
    """The module of the kernel or None, and the mesh axes of gate_up and of h."""
    batch, length, channels = elementwise.axes()
    specs = PartitionSpec(batch, length, None, channels), PartitionSpec(batch, length, channels)
    return elementwise.kernels("swiglu", (gate_up, specs[0])), specs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated_product(gate_up, kernel, backward):
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return jnp.tensordot(jax.nn.silu(gate) * up, kernel, 1)


def _gated_product_forward(gate_up, kernel, backward):
    return _gated_product(gate_up, kernel, backward), (gate_up, kernel)


def _gated_product_backward(backward, kept_arrays, dy):
    gate_up, kernel = kept_arrays
    dgate_up, h = backward(gate_up, jnp.einsum("bte,fe->btf", dy, kernel))
    return dgate_up, jnp.einsum("btf,bte->fe", h, dy)


_gated_product.defvjp(_gated_product_forward, _gated_product_backward)
