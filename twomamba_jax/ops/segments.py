"""Segments and padding: which tokens may see each other.

A segment is a maximal run of equal `segment_ids` in a row; nothing crosses its edge. Rows shorter than the array are
right-padded, and `lengths` says where they end.
"""

import jax.numpy as jnp

from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.shapes import Array, Bool, Int, Lengths, SegmentIds


def number_segments(segment_ids: SegmentIds, axis: SequenceAxis | None = None) -> Int[Array, "B T"]:
    """Numbers the segments of each row 0, 1, 2, ...: ids may recur in a row, these do not.

    Segment 0 is that of the state before the first token. Where the tokens are sharded over `axis`, that is the
    segment in which the device before ends: each device has a segment 0 of its own, which may be empty.
    """
    before = segment_ids[:, :1]
    if axis is not None:
        before = jnp.where(axis.index == 0, before, axis.receive(segment_ids[:, -1:]))
    changes = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    return jnp.cumsum(changes, axis=1, dtype=jnp.int32)


def extend_last_segment(segment_ids: SegmentIds | None, lengths: Lengths | None) -> SegmentIds | None:
    """The ids with padding in the row's last segment: the last column then names the segment whose state is final."""
    if segment_ids is None or lengths is None:
        return segment_ids
    last = jnp.take_along_axis(segment_ids, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    return jnp.where(valid_tokens(lengths, segment_ids.shape[1]), segment_ids, last)


def valid_tokens(lengths: Lengths, num_tokens: int) -> Bool[Array, "B T"]:
    """True where a token is no padding: t < lengths."""
    return jnp.arange(num_tokens)[None] < lengths[:, None]


def same_segment(left: Int[Array, "B I"], right: Int[Array, "B J"]) -> Bool[Array, "B I J"]:
    """True where two tokens share a segment."""
    return left[:, :, None] == right[:, None, :]
