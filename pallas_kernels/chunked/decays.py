"""Sums of log decays inside chunks, and the gradient of the log decays from a state's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quadratic.operands import Decay

TILE = 128


class Weights(NamedTuple):
    """How tokens and states see each other, float32; None where that is 1.

    through: [B, G, T], of the state before a token's chunk, as the token sees it. reach: [B, G, T], of a token as the
    end of its chunk sees it. keep: [B, G, N], of the state before a chunk as its end sees it.
    """

    through: jax.Array | None
    reach: jax.Array | None
    keep: jax.Array


def chunk_weights(decay: Decay | None, segment, shape: tuple[int, int, int], chunk: int) -> Weights:
    """The weights of a call: exponentials of decay sums, 0 between segments.

    Args:
      decay: the sums of log2 decays within 128 tokens, of each chunk as a sequence of its own, [B N, G, ...]; or None.
      segment: [B, T] int32, the number of each token's segment, ascending; or None. That of the state is 0.
      shape: B, T, G.
      chunk: tokens of a chunk, a multiple of 128.
    """
    batch, tokens, groups = shape
    keep = jnp.ones((batch, groups, tokens // chunk), jnp.float32)
    through = reach = None
    if decay is not None:
        prefix, suffix, totals = (jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2) for x in decay)
        tiles = (*totals.shape, TILE)
        through = prefix.reshape(tiles) + _others(totals, before=True)[..., None]
        reach = suffix.reshape(tiles) + _others(totals, before=False)[..., None]
        through, reach = (jnp.exp2(x).reshape(batch, groups, tokens) for x in (through, reach))
        keep = jnp.exp2(totals.sum(-1))
    if segment is not None:
        segments = segment.reshape(batch, -1, chunk)
        last = segments[..., -1]
        first = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1)
        seen = [(segments == edge[..., None]).reshape(batch, 1, tokens) for edge in (first, last)]
        through, reach = (jnp.where(mask, 1.0 if w is None else w, 0.0) for mask, w in zip(seen, (through, reach)))
        through, reach = (jnp.broadcast_to(w, (batch, groups, tokens)) for w in (through, reach))
        keep = jnp.where((first == last)[:, None], keep, 0.0)
    return Weights(through, reach, keep)


def decay_gradient(row_sums, column_sums, kept, chunk: int):
    """What the log decays' gradient has of states: sum_{i >= t} row_i + sum_{j < t} column_j + kept, in t's chunk.

    Args:
      row_sums: [B, G, T] float32, <dL/dw, w> over what each token reads from a state.
      column_sums: [B, G, T] float32, the same over what each token adds to one.
      kept: [B, G, N] float32, keep <S_{c-1}, dL/dS_c>.
      chunk: tokens of a chunk.

    Returns:
      [B, T, G] float32.
    """
    batch, groups, tokens = row_sums.shape
    rows, columns = (x.reshape(batch, groups, -1, chunk // TILE, TILE) for x in (row_sums, column_sums))
    later = (jnp.arange(TILE)[:, None] >= jnp.arange(TILE)).astype(rows.dtype)  # [s, t]: s is t or after it
    within = jnp.einsum("...s,st->...t", rows, later, precision="highest")
    within = within + jnp.einsum("...s,st->...t", columns, 1 - later, precision="highest")
    tiles = _others(rows.sum(-1), before=False) + _others(columns.sum(-1), before=True) + kept[..., None]
    return jnp.moveaxis((within + tiles[..., None]).reshape(batch, groups, tokens), 1, 2)


def _others(x, *, before: bool):
    """[..., tiles]: for each the sum over all tiles before it, or after it. Of a few tiles, without a product."""
    tiles = jnp.arange(x.shape[-1])
    counted = tiles < tiles[:, None] if before else tiles > tiles[:, None]
    return jnp.where(counted, x[..., None, :], 0).sum(-1)
