"""Causal depthwise convolution with a short window, a carried state, and segment resets.

Each tap is the one after it, delayed by a token. Where the tokens are sharded over devices, XLA makes a delay of a
device's own tokens and one of the device before: W - 1 inputs are passed on, and none is gathered.
"""

import jax
import jax.numpy as jnp

from twomamba_jax.ops.checks import as_arrays, as_rows
from twomamba_jax.ops.numerics import broadcast_parameter
from twomamba_jax.ops.segments import extend_last_segment, number_segments, valid_tokens
from twomamba_jax.shapes import AnyArray, Array, Float, Lengths, SegmentIds


def causal_convolution(
    x: Float[AnyArray, "B T *C"],
    kernel: Float[AnyArray, "W *C"],
    bias: Float[AnyArray, "*C"] | None = None,
    *,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
    initial_inputs: Float[AnyArray, "B M *C"] | None = None,
) -> tuple[Float[Array, "B T *C"], Float[Array, "B M *C"]]:
    """y_t = bias + sum_i kernel[W - 1 - i] x_{t - i}, i = 0, ..., W - 1, each channel on its own.

    The last tap is the current token. A tap that would cross the edge of a segment, or reach before the first input, is
    0.

    The gradients of the kernel and the bias, sums over all tokens, are taken in float32 or wider.

    Args:
      x: [B, T, ...channels].
      kernel: [W, ...channels], used in the dtype of x.
      bias: [...channels], the same.
      segment_ids: [B, T] integers; a maximal run of equal ids is a segment.
      lengths: [B] integers, the tokens that count in right-padded rows. Outputs at padding mean nothing.
      initial_inputs: the M inputs before token 0, which continue its segment; W - 1 of them matter, and more may be
        kept to go back to. None: W - 1 zeros.

    Returns:
      y like x, and the M inputs that the next call takes, in the dtype of `initial_inputs`: the last of the row's last
      segment (zeros before it).

    Raises:
      ValueError: a kernel whose channels are not those of x, initial inputs of another shape, segment ids or lengths
        that are no integers of these shapes, or lengths that are known and out of range.

    Examples:
      >>> x = jnp.array([1.0, 2, 3, 4]).reshape(1, 4, 1)
      >>> y, inputs = causal_convolution(x, jnp.ones((2, 1)))
      >>> y.ravel().tolist(), inputs.ravel().tolist()
      ([1.0, 3.0, 5.0, 7.0], [4.0])
    """
    x, kernel, bias, initial_inputs = as_arrays(x, kernel, bias, initial_inputs)
    segment_ids, lengths = as_rows(x.shape, segment_ids, lengths)
    width, channels = kernel.shape[0], x.shape[2:]
    if kernel.shape[1:] != channels:
        raise ValueError(f"kernel must be [W, {', '.join(map(str, channels))}] for x {x.shape}, got {kernel.shape}")
    if initial_inputs is None:
        initial_inputs = jnp.zeros((x.shape[0], width - 1, *channels), x.dtype)
    batch, before, *rest = initial_inputs.shape
    if (batch, *rest) != (x.shape[0], *channels) or before < width - 1:
        raise ValueError(
            f"initial_inputs must be [B, at least W - 1, ...channels], here {(x.shape[0], width - 1, *channels)}, got "
            f"{initial_inputs.shape}"
        )

    size = x.shape[1]

    def broadcast(mask):
        return mask.reshape(*mask.shape, *[1] * len(channels))

    if lengths is not None:
        # Padding may hold NaN, and 0 times that would be in the gradient of the kernel.
        x = jnp.where(broadcast(valid_tokens(lengths, size)), x, 0)
    is_first = broadcast(jnp.arange(size)[None] == 0)
    taps = [broadcast_parameter(tap, x.shape, x.dtype) for tap in kernel]
    earlier, y = x, taps[-1] * x
    if bias is not None:
        y = broadcast_parameter(bias, x.shape, x.dtype) + y
    for distance in range(1, width):
        earlier = jnp.where(is_first, initial_inputs[:, -distance, None].astype(x.dtype), delay(earlier))
        if segment_ids is not None:
            continues = broadcast(segment_ids == delay(segment_ids))
            earlier = jnp.where(is_first | continues, earlier, 0)
        y = y + taps[-1 - distance] * earlier

    extended = jnp.concatenate([initial_inputs.astype(x.dtype), x], axis=1)
    counts = jnp.full((x.shape[0],), size) if lengths is None else lengths
    last = counts[:, None] + jnp.arange(before)[None]
    final = jnp.take_along_axis(extended, broadcast(last), axis=1)
    if segment_ids is not None:
        segment = number_segments(extend_last_segment(segment_ids, lengths))
        # The inputs before token 0 are in its segment, which is segment 0.
        of_inputs = jnp.take_along_axis(jnp.pad(segment, ((0, 0), (before, 0))), last, axis=1)
        final = jnp.where(broadcast(of_inputs == segment[:, -1:]), final, 0)
    return y, final.astype(initial_inputs.dtype)


def delay(x):
    """x [B, T, ...] one token later, with zeros at token 0. As a pad it is partitioned without a copy of the rest."""
    no_padding = [(0, 0, 0)] * (x.ndim - 2)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (1, -1, 0), *no_padding])
