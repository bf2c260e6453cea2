"""A linear map between axes with names."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.layers.partitioning import with_logical_axes
from twomamba_jax.ops.kept import kept, kept_cast
from twomamba_jax.ops.numerics import broadcast_parameter
from twomamba_jax.shapes import AnyArray


def uniform(fan_in: int):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): how the paper's replaced layers are initialised (its authors' code)."""

    def init(key, shape, dtype):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def product(x: AnyArray, kernel: AnyArray, rank: int) -> jax.Array:
    """x [..., *in] times kernel [*in, *out], over the last `rank` dimensions of x.

    On a GPU one row goes in twice: of a vector times a matrix XLA makes elementwise products, which it rounds to their
    dtype and writes to memory before it adds them up.
    """
    is_row = x.ndim > rank and math.prod(x.shape[:-rank]) == 1
    if not is_row or jax.default_backend() != "gpu":
        return jnp.tensordot(x, kernel, rank)
    twice = jax.lax.optimization_barrier(jnp.concatenate([x, x]))
    return jnp.tensordot(twice, kernel, rank)[:1]


class Projection(nn.Module):
    """y = x W, or x W + b, over the last dimensions of x.

    `nn.DenseGeneral` will not do: it draws its kernel flat, where the names of the kernel's axes do not fit.

    Attributes:
      in_axes: logical names of the dimensions of x that are summed over.
      out_axes: logical names of the dimensions that take their place.
      out_dims: their sizes.
      use_bias: whether there is a b.
      kernel_init: of W; None: `uniform`.
      dtype: of the product.
      param_dtype: of the kernel, which has dimensions (*in, *out), and the bias.
    """

    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    out_dims: tuple[int, ...]
    _: dataclasses.KW_ONLY
    use_bias: bool = False
    kernel_init: Any = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __call__(self, x: AnyArray) -> jax.Array:
        """x [..., *in] -> [..., *out]."""
        rank = len(self.in_axes)
        kernel, bias = self.parameters(x.shape[-rank:])
        y = product(x.astype(self.dtype), kept_cast(kernel, self.dtype), rank)
        return y if bias is None else y + broadcast_parameter(bias, y.shape, self.dtype)

    @nn.compact
    def parameters(self, in_dims: tuple[int, ...]) -> tuple[AnyArray, AnyArray | None]:
        """W and b, in `param_dtype`; b is None where there is none."""
        init = uniform(math.prod(in_dims))
        kernel_init = with_logical_axes(self.kernel_init or init, (*self.in_axes, *self.out_axes))
        kernel = self.param("kernel", kernel_init, (*in_dims, *self.out_dims), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", with_logical_axes(init, self.out_axes), self.out_dims, self.param_dtype)


def joint_kernel(projections: Sequence[Projection], in_dims: tuple[int, ...]) -> jax.Array:
    """The kernels of projections without biases, [*in, projections, *out]: one product of x makes all that they do."""
    first = projections[0]
    kernels = [projection.parameters(in_dims)[0].astype(first.dtype) for projection in projections]
    return kept(jnp.stack(kernels, axis=len(first.in_axes)))
