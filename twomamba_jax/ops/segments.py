"""Segments and padding: which tokens may see each other.

A segment is a maximal run of equal `segment_ids` in a row; nothing crosses its edge. Rows shorter than the array are
right-padded, and `lengths` says where they end.
"""

import jax.numpy as jnp

from twomamba_jax.shapes import Array, Bool, Int, Lengths, SegmentIds


def segment_runs(segment_ids: SegmentIds, lengths: Lengths | None = None) -> Int[Array, "B T"]:
    """Numbers the segments of each row 0, 1, 2, ...: ids may recur in a row, runs do not.

    Padding continues the row's last segment, so that the last column names the segment whose state is final.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    runs = jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    if lengths is None:
        return runs
    last = jnp.take_along_axis(runs, jnp.maximum(lengths - 1, 0)[:, None], axis=1)
    return jnp.minimum(runs, last)


def valid_tokens(lengths: Lengths, num_tokens: int) -> Bool[Array, "B T"]:
    """True where a token is no padding: t < lengths."""
    return jnp.arange(num_tokens) < lengths[:, None]


def same_run(left: Int[Array, "B I"], right: Int[Array, "B J"]) -> Bool[Array, "B I J"]:
    """True where two tokens share a segment."""
    return left[:, :, None] == right[:, None, :]
