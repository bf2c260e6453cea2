"""XLA as an implementation of the operation: the forms, for every call."""

from twomamba_jax.ops.forms import recurrent
from twomamba_jax.ops.forms.blockwise import blockwise
from twomamba_jax.ops.forms.chunked import chunked
from twomamba_jax.ops.forms.parallel import parallel
from twomamba_jax.ops.layout import heads_first, tokens_first
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.score import SCORES
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import State


def attend(
    op: Operation,
    form,
    chunk_size: int | None,
    return_final_state: bool,
    q,
    k,
    v,
    log_decay,
    segment,
    state: State | None,
    axis: SequenceAxis | None,
):
    """y [B, T, H, V] in q's dtype, and the final state if it is wanted and the form computes it on the way, or None.

    A call for `sharding.shard_call`, of arrays [B, T, heads, dim].
    """
    arrays = heads_first(q, k, v, log_decay)
    chunk_size, final = chunk_size or SCORES[op.score].chunk_size, None
    if axis is not None and form == "parallel":  # all of this device's tokens at once
        form, chunk_size = "chunked", q.shape[1]
    if form == "parallel":
        y = parallel(op, *arrays, segment, state)
    elif form == "recurrent":
        y, final = recurrent.recurrent(op, *arrays, segment, state, axis)
    elif op.finite:
        y, final = chunked(op, *arrays, segment, state, chunk_size, axis)
    else:
        y = blockwise(op, *arrays, segment, state, chunk_size, axis)
    return tokens_first(y).astype(q.dtype), final if return_final_state else None
