"""The gated MLP of Llama 2."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.layers.projection import Projection, joint_kernel, product
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.kept import kept_cast
from twomamba_jax.ops.swiglu import can_gate, gated_product
from twomamba_jax.shapes import AnyArray

PROJECTION_INIT = nn.initializers.normal(0.02)  # Appendix B: standard deviation 0.02


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * x W_up) W_down, without biases (Shazeer, arXiv 2002.05202).

    Attributes:
      mlp_dim: hidden width.
      dtype: of the products.
      param_dtype: of the kernels.
      elementwise: the kernels for the backward pass.

    Examples:
      >>> y, variables = jax.jit(SwiGLU(mlp_dim=16).init_with_output)(jax.random.key(0), jnp.ones((1, 5, 8)))
      >>> y.shape, sorted(variables["params"])
      ((1, 5, 8), ['down', 'gate', 'up'])
    """

    mlp_dim: int
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    elementwise: Elementwise = Elementwise()

    @nn.compact
    def __call__(self, x: AnyArray) -> jax.Array:
        """x [B, T, E] -> [B, T, E]."""

        def dense(name, in_axis, out_axis, features):
            return Projection(
                (in_axis,),
                (out_axis,),
                (features,),
                kernel_init=PROJECTION_INIT,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        gate, up = dense("gate", "embed", "mlp", self.mlp_dim), dense("up", "embed", "mlp", self.mlp_dim)
        down = dense("down", "mlp", "embed", x.shape[-1])
        if can_gate(jax.ShapeDtypeStruct((*x.shape[:-1], 2, self.mlp_dim), self.dtype), self.elementwise):
            gate_up = product(x.astype(self.dtype), joint_kernel((gate, up), x.shape[-1:]), 1)
            gate_up = nn.with_logical_constraint(gate_up, ("batch", "length", None, "mlp"))
            kernel, _ = down.parameters((self.mlp_dim,))
            return gated_product(gate_up, kept_cast(kernel, self.dtype), self.elementwise)
        gate, up = gate(x), up(x)
        return down(nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp")))
