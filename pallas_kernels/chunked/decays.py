"""Sums of log decays inside chunks, and the gradient of the log decays from a state's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 128


class Weights(NamedTuple):
    """How tokens and states see each other, float32; None where that is 1.

    through: [B, G, T], of the state before a token's chunk, as the token sees it. reach: [B, G, T], of a token as the
    end of its chunk sees it. keep: [B, G, N], of the state before a chunk as its end sees it.
    """

    through: jax.Array | None
    reach: jax.Array | None
    keep: jax.Array


def chunk_weights(log_decay, segment, shape: tuple[int, int, int], chunk: int) -> Weights:
    """The weights of a call: exponentials of decay sums, 0 between segments.

    Args:
      log_decay: [B, T, G] float32, or None.
      segment: [B, T] int32, the number of each token's segment, ascending; or None. That of the state is 0.
      shape: B, T, G.
      chunk: tokens of a chunk, a multiple of 128.
    """
    batch, tokens, groups = shape
    keep = jnp.ones((batch, groups, tokens // chunk), jnp.float32)
    through = reach = None
    if log_decay is not None:
        x = jnp.moveaxis(log_decay, 1, 2).reshape(batch, groups, -1, chunk // TILE, TILE)
        through = jnp.exp(_sums(x, inclusive=True)).reshape(batch, groups, tokens)
        backwards = _sums(x[..., ::-1, ::-1], inclusive=False)[..., ::-1, ::-1]
        reach = jnp.exp(backwards).reshape(batch, groups, tokens)
        keep = jnp.exp(x.sum((-2, -1)))
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
    later = _sums(rows[..., ::-1, ::-1], inclusive=True)[..., ::-1, ::-1]
    total = later + _sums(columns, inclusive=False) + kept[..., None, None]
    return jnp.moveaxis(total.reshape(batch, groups, tokens), 1, 2)


def _sums(x, inclusive: bool):
    """Sums over everything before an entry of [..., tiles, 128], and the entry itself if `inclusive`."""

    def before(size, diagonal):
        return jnp.triu(jnp.ones((size, size), x.dtype), 1 - diagonal)  # [s, t]: s counts for t

    within = jnp.einsum("...s,st->...t", x, before(TILE, inclusive), precision="highest")
    return within + jnp.einsum("...s,st->...t", x.sum(-1), before(x.shape[-2], False), precision="highest")[..., None]
