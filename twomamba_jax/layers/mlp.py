"""The gated MLP of Llama 2."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.layers.projection import Projection
from twomamba_jax.shapes import AnyArray

PROJECTION_INIT = nn.initializers.normal(0.02)  # Appendix B: standard deviation 0.02


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * x W_up) W_down, without biases (Shazeer, arXiv 2002.05202).

    Attributes:
      mlp_dim: hidden width.
      dtype: of the products.
      param_dtype: of the kernels.

    Examples:
      >>> y, variables = jax.jit(SwiGLU(mlp_dim=16).init_with_output)(jax.random.key(0), jnp.ones((1, 5, 8)))
      >>> y.shape, sorted(variables["params"])
      ((1, 5, 8), ['down', 'gate', 'up'])
    """

    mlp_dim: int
    _: dataclasses.KW_ONLY
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

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

        gate = dense("gate", "embed", "mlp", self.mlp_dim)(x)
        up = dense("up", "embed", "mlp", self.mlp_dim)(x)
        hidden = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        return dense("down", "mlp", "embed", x.shape[-1])(hidden)
