"""Causal depthwise convolution with a short window, a carried state, and segment resets."""

import jax.numpy as jnp

from twomamba_jax.ops.segments import segment_runs
from twomamba_jax.shapes import Array, Float, Lengths, SegmentIds


def causal_convolution(
    x: Float[Array, "B T *C"],
    kernel: Float[Array, "W *C"],
    bias: Float[Array, "*C"] | None = None,
    *,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
    initial_inputs: Float[Array, "B M *C"] | None = None,
) -> tuple[Float[Array, "B T *C"], Float[Array, "B M *C"]]:
    """y_t = bias + sum_i kernel[W - 1 - i] x_{t - i}, i = 0, ..., W - 1, each channel on its own.

    The last tap is the current token. A tap that would cross the edge of a segment, or reach before the first input, is
    0.

    Args:
      x: [B, T, ...channels].
      kernel: [W, ...channels].
      bias: [...channels].
      segment_ids: [B, T] integers; a maximal run of equal ids is a segment.
      lengths: [B] integers, the tokens that count in right-padded rows.
      initial_inputs: the M inputs before token 0, which continue its segment; W - 1 of them matter, and more may be
        kept to go back to. None: W - 1 zeros.

    Returns:
      y like x, and the M inputs that the next call takes, in the dtype of `initial_inputs`: the last of the row's last
      segment (zeros before it).

    Raises:
      ValueError: a kernel whose channels are not those of x, or initial inputs of another shape.
    """
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
    carried_dtype = initial_inputs.dtype
    extended = jnp.concatenate([initial_inputs.astype(x.dtype), x], axis=1)
    run = None if segment_ids is None else segment_runs(segment_ids, lengths)
    # The inputs before token 0 are in its segment, which is run 0.
    extended_run = None if run is None else jnp.pad(run, ((0, 0), (before, 0)))

    def broadcast(mask):
        return mask.reshape(*mask.shape, *[1] * len(channels))

    y = 0 if bias is None else bias
    for tap in range(width):
        reach = slice(before - width + 1 + tap, before - width + 1 + tap + size)
        shifted = extended[:, reach]
        if run is not None:
            shifted = jnp.where(broadcast(extended_run[:, reach] == run), shifted, 0)
        y = y + kernel[tap] * shifted

    counts = jnp.full((x.shape[0],), size) if lengths is None else lengths
    last = counts[:, None] + jnp.arange(before)
    final = jnp.take_along_axis(extended, broadcast(last), axis=1)
    if run is not None:
        final = jnp.where(broadcast(jnp.take_along_axis(extended_run, last, axis=1) == run[:, -1:]), final, 0)
    return y, final.astype(carried_dtype)
