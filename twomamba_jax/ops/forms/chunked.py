"""The chunked form of the finite scores: linear in T.

What a chunk of C tokens adds to the state depends on that chunk alone (update); `jax.lax.associative_scan` carries the
states across chunks (scan); then every chunk attends to itself (intra) and to the state before it (query). Update and
query visit the chunks one after the other and are recomputed in the backward pass, so that the features of one chunk
only are ever in memory: what is kept is a state per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twomamba_jax.ops import recurrence
from twomamba_jax.ops.forms import stages
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import FiniteState


class _Chunks(NamedTuple):
    """The arrays of a call with a leading axis of N chunks; None where the call has none."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    segment: jax.Array | None
    continues: jax.Array | None  # [N, B, C]: the token is in the segment that the chunk began in
    reaches: jax.Array | None  # [N, B, C]: the token is in the segment that the chunk ends in
    kept: jax.Array | None  # [N, B]: those two are the same, so that the state survives the chunk


def chunked(
    op: Operation,
    q,
    k,
    v,
    log_decay,
    segment,
    state: FiniteState | None,
    chunk_size: int,
    axis: SequenceAxis | None = None,
):
    """The finite scores in chunks; heads-first arrays as in `stages`. `axis`: tokens and states as in `scan`.

    Returns:
      y [B, G, R, T, V] in the accumulation dtype, and the final state.
    """
    chunks = _split_all(q, k, v, log_decay, segment, chunk_size)

    @jax.checkpoint
    def update(chunk: _Chunks):
        added = stages.update(op, chunk.k, chunk.v, chunk.log_decay, chunk.reaches)
        weight = stages.carry_weight(chunk.log_decay, chunk.kept, added.kv.dtype)
        return jnp.broadcast_to(weight, added.kv.shape[:2]), added

    @jax.checkpoint
    def output(args: tuple[_Chunks, FiniteState]):
        chunk, before = args
        sums = stages.intra(op, chunk.q, chunk.k, chunk.v, chunk.log_decay, chunk.segment)
        return (sums + stages.query(op, chunk.q, chunk.log_decay, chunk.continues, before)).outputs(op)

    weights, added = jax.lax.map(update, chunks)
    before, final = scan(weights, added, state, axis)
    y = jax.lax.map(output, (chunks, before))
    return join(y, 3)[..., : q.shape[3], :], final


def scan(
    weights: jax.Array, added: FiniteState, state: FiniteState | None, axis: SequenceAxis | None = None
) -> tuple[FiniteState, FiniteState]:
    """S_c = weights_c S_{c-1} + added_c along the leading axis, from `state` (None: from zero).

    Where the tokens are sharded over `axis`, each device has N transitions, which follow those of the device before.

    Args:
      weights: [N, B, G].
      added: a state with a leading axis of N.
      state: S_{-1}.

    Returns:
      The N states before each transition, and the one after the last (of the last device).
    """
    if axis is not None:
        state = axis.enter(weights, added, state)
    elif state is None:
        state = jax.tree.map(lambda x: jnp.zeros_like(x[0]), added)
    weights = jnp.concatenate([jnp.ones_like(weights[:1]), weights])
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None].astype(rest.dtype), rest]), state, added)
    _, states = jax.lax.associative_scan(recurrence.compose, (weights, states))
    final = jax.tree.map(lambda x: x[-1], states)
    return jax.tree.map(lambda x: x[:-1], states), final if axis is None else axis.last(final)


def _split_all(q, k, v, log_decay, segment, chunk_size) -> _Chunks:
    """Cuts every array into chunks. The padding at the end has zero keys and no decay: it changes no state."""

    def cut(x, axis):
        return None if x is None else split(x, axis, chunk_size)

    segment = None if segment is None else split(segment, 1, chunk_size, mode="edge")
    if segment is None:
        continues = reaches = kept = None
    else:
        first, last = jnp.concatenate([jnp.zeros_like(segment[:1, :, -1]), segment[:-1, :, -1]]), segment[:, :, -1]
        continues, reaches, kept = segment == first[..., None], segment == last[..., None], first == last
    return _Chunks(cut(q, 3), cut(k, 2), cut(v, 2), cut(log_decay, 2), segment, continues, reaches, kept)


def split(x, axis: int, chunk_size: int, mode: str = "constant"):
    """[..., T, ...] -> [N, ..., C, ...], padded at the end to whole chunks."""
    count = -(-x.shape[axis] // chunk_size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * chunk_size - x.shape[axis])
    x = jnp.pad(x, padding, mode=mode)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk_size, *x.shape[axis + 1 :]), axis, 0)


def join(x, axis: int):
    """[N, ..., C, ...] -> [..., N C, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
