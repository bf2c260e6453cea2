"""The convolutions over queries, keys and values that one product has made, with one gradient for it."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops.convolution import delay
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.kept import kept, kept_cast
from twomamba_jax.shapes import AnyArray, Array, Float, SegmentIds


def joint_convolution(
    x: Float[AnyArray, "B T P H K"],
    kernel: Float[AnyArray, "W P H K"],
    bias: Float[AnyArray, "P H K"] | None,
    segment_ids: SegmentIds | None,
    elementwise: Elementwise,
) -> tuple[Float[Array, "B T H K"], ...]:
    """`causal_convolution` of each of P parts of x, whose backward pass is a kernel: `can_convolve` says whether so.

    The gradients of the kernel and the bias, sums over all tokens, are taken in float32.

    Args:
      x: [B, T, P, H, K].
      kernel: [W, P, H, K], used in the dtype of x.
      bias: [P, H, K], the same, or None.
      segment_ids: [B, T] integers; a maximal run of equal ids is a segment.
      elementwise: the kernels.
    """
    kernels, spec = _kernels(x, kernel, elementwise)
    batch, _, heads = elementwise.axes()
    y = PartitionSpec(batch, None, heads)
    in_specs = spec, PartitionSpec(None, None, heads), PartitionSpec(batch), *[y] * x.shape[2]

    def backward(x, kernel, continues, *dy):
        *_, heads, head_dim = x.shape
        flat = [array.reshape(*array.shape[:-2], heads * head_dim) for array in (x, kernel, *dy)]
        dx, sums = kernels.convolution_backward(*flat[:2], continues, *flat[2:])
        return dx.reshape(x.shape), sums.reshape(*sums.shape[:-1], heads, head_dim)

    call = elementwise.shard(backward, in_specs, (spec, PartitionSpec(batch, None, None, heads)))
    bias = jnp.zeros(kernel.shape[1:], kernel.dtype) if bias is None else bias
    ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    continues = (ids == jnp.roll(ids, 1, axis=1)) & (jnp.arange(x.shape[1]) > 0)
    return _convolve(x, kernel, bias, kept(continues.astype(jnp.float32)), call)


def can_convolve(x: jax.ShapeDtypeStruct, kernel: jax.ShapeDtypeStruct, elementwise: Elementwise) -> bool:
    """Whether there is a kernel for the backward pass of `joint_convolution`: of all tokens of a row on one device."""
    return _kernels(x, kernel, elementwise)[0] is not None


def _kernels(x, kernel, elementwise: Elementwise):
    """The module of the kernel or None, and the mesh axes of x."""
    batch, length, heads = elementwise.axes()
    spec, of_kernel = PartitionSpec(batch, length, None, heads), PartitionSpec(None, None, heads)
    whole = [("tokens of a row", length)]
    return elementwise.kernels("convolution", (x, spec), (kernel, of_kernel), whole=whole), spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(x, kernel, bias, continues, backward):
    return _convolve_forward(x, kernel, bias, continues, backward)[0]


def _convolve_forward(x, kernel, bias, continues, backward):
    taps, offsets = kept_cast(kernel, x.dtype), kept_cast(bias, x.dtype)
    follows = continues[..., None, None] > 0
    y = []
    for part in range(x.shape[2]):
        earlier = x[:, :, part]
        total = offsets[part] + taps[-1, part] * earlier
        for tap in taps[-2::-1, part]:
            earlier = jnp.where(follows, delay(earlier), 0)
            total = total + tap * earlier
        y.append(total)
    return tuple(y), (x, taps, continues, kernel[:0], bias[:0])


def _convolve_backward(backward, kept_arrays, dy):
    x, taps, continues, kernel, bias = kept_arrays
    dx, sums = backward(x, taps, continues, *dy)
    sums = sums.sum(0)
    return dx, sums[:-1].astype(kernel.dtype), sums[-1].astype(bias.dtype), jnp.zeros_like(continues)


_convolve.defvjp(_convolve_forward, _convolve_backward)
