"""The convolutions over queries, keys and values that one product has made, with one gradient for it.

Where the tokens of a row are sharded, each device passes its last W - 1 inputs on to the one after it, and the first
W - 1 gradients to the one before it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops.convolution import delay
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.kept import kept, kept_cast
from twomamba_jax.ops.sharding import axis_names, check_multiple, devices_of, sequence_axis
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

    Raises:
      ValueError: rows, tokens or heads are no multiple of the devices that they are sharded over.
    """
    rows, tokens, parts, heads_of_x, _ = x.shape
    kernels, spec = _kernels(x, kernel, elementwise)
    batch, length, heads = elementwise.axes()
    check_multiple(rows, "rows of the batch", batch)
    check_multiple(tokens, "tokens", length)
    check_multiple(heads_of_x, "heads", heads)
    y = PartitionSpec(batch, length, heads)
    of_sums = PartitionSpec(axis_names(batch) + axis_names(length), None, None, heads)
    of_kernel, of_tokens = PartitionSpec(None, None, heads), PartitionSpec(batch, length)
    axis = sequence_axis(elementwise.partition)

    def forward(x, taps, offsets, continues):
        return _forward(axis, x, taps, offsets, continues)

    def backward(x, kernel, continues, *dy):
        shape, (*_, heads, head_dim) = x.shape, x.shape
        x, kernel, *dy = (array.reshape(*array.shape[:-2], heads * head_dim) for array in (x, kernel, *dy))
        dx, sums = kernels.convolution_backward(x, kernel, continues, *dy)
        if axis is not None:
            dx, sums = _with_next_device(axis, dx, sums, x, kernel, continues, dy)
        return dx.reshape(shape), sums.reshape(*sums.shape[:-1], heads, head_dim)

    calls = (
        elementwise.shard(forward, (spec, of_kernel, PartitionSpec(None, heads), of_tokens), (y,) * parts),
        elementwise.shard(backward, (spec, of_kernel, of_tokens, *[y] * parts), (spec, of_sums)),
    )
    bias = jnp.zeros(kernel.shape[1:], kernel.dtype) if bias is None else bias
    ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    continues = (ids == delay(ids)) & (jnp.arange(tokens) > 0)
    return _convolve(x, kernel, bias, kept(continues.astype(jnp.float32)), calls)


def can_convolve(x: jax.ShapeDtypeStruct, kernel: jax.ShapeDtypeStruct, elementwise: Elementwise) -> bool:
    """Whether there is a kernel for the backward pass of `joint_convolution`; each device has W - 1 tokens then."""
    tokens = x.shape[1] // devices_of(elementwise.axes()[1])
    return tokens >= kernel.shape[0] - 1 and _kernels(x, kernel, elementwise)[0] is not None


def _kernels(x, kernel, elementwise: Elementwise):
    """The module of the kernel or None, and the mesh axes of x."""
    batch, length, heads = elementwise.axes()
    spec, of_kernel = PartitionSpec(batch, length, None, heads), PartitionSpec(None, None, heads)
    return elementwise.kernels("convolution", (x, spec), (kernel, of_kernel)), spec


def _forward(axis, x, taps, offsets, continues):
    """The outputs of a device's tokens."""
    follows, is_first = continues[..., None, None] > 0, (jnp.arange(x.shape[1]) == 0)[:, None, None]
    y = []
    for part in range(x.shape[2]):
        earlier = x[:, :, part]
        total = offsets[part] + taps[-1, part] * earlier
        for tap in taps[-2::-1, part]:
            before = delay(earlier)
            if axis is not None:
                before = jnp.where(is_first, axis.receive(earlier[:, -1:]), before)
            earlier = jnp.where(follows, before, 0)
            total = total + tap * earlier
        y.append(total)
    return tuple(y)


def _with_next_device(axis, dx, sums, x, kernel, continues, dy):
    """A device's `convolution_backward` with its last W - 1 tokens' part in the next device's first outputs."""
    edge, taps = len(kernel) - 1, kernel.astype(jnp.float32)
    first, follows = axis.receive((jnp.stack([d[:, :edge] for d in dy], 2), continues[:, :edge]), reverse=True)
    later = jnp.concatenate([jnp.stack([d[:, -edge:] for d in dy], 2), first], 1).astype(jnp.float32)
    follows = jnp.concatenate([continues[:, -edge:], follows], 1)[..., None, None]
    last, of_edge, reaches = x[:, -edge:].astype(jnp.float32), taps[edge] * later[:, :edge], 1
    for distance in range(1, edge + 1):
        tap, seen = edge - distance, slice(distance, distance + edge)
        reaches = reaches * follows[:, seen]
        d = later[:, seen] * reaches
        of_edge = of_edge + taps[tap] * d
        sums = sums.at[0, tap].add((last * d)[:, tap:].sum((0, 1)))  # those of the tokens before are in it
    return dx.at[:, -edge:].set(of_edge.astype(dx.dtype)), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve(x, kernel, bias, continues, calls):
    return _convolve_forward(x, kernel, bias, continues, calls)[0]


def _convolve_forward(x, kernel, bias, continues, calls):
    taps, offsets = kept_cast(kernel, x.dtype), kept_cast(bias, x.dtype)
    return calls[0](x, taps, offsets, continues), (x, taps, continues, kernel[:0], bias[:0])


def _convolve_backward(calls, kept_arrays, dy):
    x, taps, continues, kernel, bias = kept_arrays
    dx, sums = calls[1](x, taps, continues, *dy)
    sums = sums.sum(0)
    return dx, sums[:-1].astype(kernel.dtype), sums[-1].astype(bias.dtype), jnp.zeros_like(continues)


_convolve.defvjp(_convolve_forward, _convolve_backward)
