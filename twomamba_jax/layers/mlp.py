"""The gated MLP of Llama 2."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

PROJECTION_INIT = nn.initializers.normal(0.02)  # Appendix B: standard deviation 0.02


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * x W_up) W_down, without biases (Shazeer, arXiv 2002.05202).

    Attributes:
      mlp_dim: hidden width.
      dtype: of the products.
      param_dtype: of the kernels.
    """

    mlp_dim: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, E] -> [B, T, E]."""

        def dense(name, features, axes):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.with_logical_partitioning(PROJECTION_INIT, axes),
                name=name,
            )

        gate = dense("gate", self.mlp_dim, ("embed", "mlp"))(x)
        up = dense("up", self.mlp_dim, ("embed", "mlp"))(x)
        hidden = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        return dense("down", x.shape[-1], ("mlp", "embed"))(hidden)
