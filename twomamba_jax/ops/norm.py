"""Root mean square normalisation, by itself and with the residual connection around what follows it."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.kept import kept
from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.ops.sharding import axis_names
from twomamba_jax.shapes import AnyArray, Float


def divide_by_rms(x: AnyArray, rank: int, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps), the mean over the last `rank` dimensions, in float32 or wider."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return wide * jax.lax.rsqrt(kept(jnp.mean(wide * wide, axis=tuple(range(-rank, 0)), keepdims=True) + eps))


def norm_with_residual(
    x: Float[AnyArray, "B T E"],
    scale: Float[AnyArray, "E"],
    eps: float,
    copies: int,
    elementwise: Elementwise,
    keep: bool = False,
) -> tuple[Float[AnyArray, "B T E"], ...] | None:
    """(x, y, ..., y) with y = scale * x / sqrt(mean(x^2) + eps) in x's dtype, if there is a kernel for its gradient.

    The kernel adds up the gradients of the copies of y, of which each goes into a product of its own, and adds to x's
    what comes by the x that is returned, as a residual connection. Autodiff of one y would have a pass for each sum.

    Args:
      x: [B, T, E].
      scale: [E], used in float32.
      eps: added to the mean.
      copies: of y.
      elementwise: the kernels.
      keep: whether a rematerialised block keeps y for the backward pass (`ops.kept`), or computes it again.

    Returns:
      x and the copies; None: there is no kernel for this call.
    """
    if _kernels(x, elementwise) is None:
        return None
    return _fork(x, scale.astype(jnp.float32), eps, copies, elementwise, keep)


def _kernels(x, elementwise: Elementwise):
    batch, length, _ = elementwise.axes()
    return elementwise.kernels("norm", (x, PartitionSpec(batch, length)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _fork(x, scale, eps, copies, elementwise, keep):
    return _copies(x, scale, eps, copies, keep)


def _copies(x, scale, eps, copies, keep):
    y = (scale * divide_by_rms(x, 1, eps)).astype(x.dtype)
    return x, *[kept(y) if keep else y] * copies


def _fork_forward(x, scale, eps, copies, elementwise, keep):
    # Not by `_fork`: a policy of `jax.checkpoint` sees no name inside it.
    return _copies(x.value, scale.value, eps, copies, keep), (x.value, scale.value)


def _fork_backward(eps, copies, elementwise, keep, kept_arrays, gradients):
    kernels, (x, scale) = _kernels(kept_arrays[0], elementwise), kept_arrays
    dresidual, *dys = (None if type(dy) is SymbolicZero else dy for dy in gradients)
    dys = [dy for dy in dys if dy is not None]
    if not dys:
        return dresidual, jnp.zeros_like(scale)
    arrays = dys if dresidual is None else [*dys, dresidual]

    def backward(x, scale, *arrays):
        flat = [array.reshape(-1, x.shape[-1]) for array in arrays]
        dresidual = None if len(flat) == len(dys) else flat.pop()
        dx, dscale = kernels.norm_backward(x.reshape(-1, x.shape[-1]), scale, tuple(flat), dresidual, eps)
        return dx.reshape(x.shape), dscale

    batch, length, _ = elementwise.axes()
    tokens, parts = PartitionSpec(batch, length), PartitionSpec(axis_names(batch) + axis_names(length))
    call = elementwise.shard(backward, (tokens, PartitionSpec(), *[tokens] * len(arrays)), (tokens, parts))
    dx, parts = call(x, scale, *arrays)
    return dx, parts.sum(0)


_fork.defvjp(_fork_forward, _fork_backward, symbolic_zeros=True)
