"""Root mean square normalisation."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.layers.partitioning import with_logical_axes
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.norm import divide_by_rms, norm_with_residual
from twomamba_jax.shapes import AnyArray


class RMSNorm(nn.Module):
    """y = scale * x / sqrt(mean(x^2) + eps), the mean over the last `len(axes)` dimensions, in float32 or wider.

    Attributes:
      axes: logical names of the normalised dimensions, `("embed",)` or `("heads", "head_dim")`.
      eps: added to the mean.
      dtype: of the result.
      param_dtype: of `scale`, which has the normalised dimensions and starts at 1.
      groups: equal parts of the first normalised dimension, each with a mean of its own.
      elementwise: the kernels for the backward pass.

    Examples:
      >>> y, _ = RMSNorm(eps=0).init_with_output(jax.random.key(0), jnp.array([[3.0, -3.0]]))
      >>> y.tolist()
      [[1.0, -1.0]]
    """

    axes: tuple[str, ...] = ("embed",)
    _: dataclasses.KW_ONLY
    eps: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    groups: int = 1
    elementwise: Elementwise = Elementwise()

    @nn.compact
    def __call__(self, x: AnyArray, copies: int | None = None, keep: bool = False) -> jax.Array | tuple[jax.Array, ...]:
        """y for x [..., *dims]; or (x, y, ..., y), for a residual connection around so many products, each of a y.

        `keep` is as in `norm_with_residual`.
        """
        init, rank = with_logical_axes(nn.initializers.ones, self.axes), len(self.axes)
        scale = self.param("scale", init, x.shape[-rank:], self.param_dtype)
        plain = len(self.axes) == self.groups == 1 and self.dtype == x.dtype
        if copies and plain and (fork := norm_with_residual(x, scale, self.eps, copies, self.elementwise, keep)):
            return fork
        y = divide_by_rms(self._apart(x, rank), rank, self.eps).reshape(x.shape)
        y = (y * jnp.expand_dims(scale, range(x.ndim - scale.ndim))).astype(self.dtype)
        return y if copies is None else (x, *[y] * copies)

    def _apart(self, x: AnyArray, rank: int) -> AnyArray:
        """x [..., first, *rest] as [..., groups, first / groups, *rest]."""
        if self.groups == 1:
            return x
        axis = x.ndim - rank
        return x.reshape(*x.shape[:axis], self.groups, x.shape[axis] // self.groups, *x.shape[axis + 1 :])
