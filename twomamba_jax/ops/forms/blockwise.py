"""The chunked form of the exponential score: online softmax over blocks, O(T^2) time and O(T) memory.

A block of queries visits the blocks of keys from its own backwards, then the cache. In that order the decay between two
blocks is a running sum over the blocks passed. Of a block of queries only the inputs are kept for the backward pass.

Where the tokens are sharded over devices, each gathers the keys of all, and its own queries visit them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twomamba_jax.ops.decay import prefix_log_decay, suffix_log_decay
from twomamba_jax.ops.forms import key_values, stages
from twomamba_jax.ops.forms.chunked import join, split
from twomamba_jax.ops.numerics import accumulation_dtype, contract
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.segments import same_segment
from twomamba_jax.ops.sequence import SequenceAxis
from twomamba_jax.ops.state import KeyValueCache


class _Partial(NamedTuple):
    """A softmax over the keys seen so far: the largest logit (0 if unnormalised), and the sums relative to it."""

    largest: jax.Array
    sums: stages.Sums


class _Block(NamedTuple):
    """The keys of one block; log_decay [B, G, C], segment [B, C] or None."""

    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    segment: jax.Array | None


def blockwise(
    op: Operation,
    q,
    k,
    v,
    log_decay,
    segment,
    state: KeyValueCache | None,
    chunk_size: int,
    axis: SequenceAxis | None = None,
):
    """The exponential score in blocks of `chunk_size` tokens; heads-first arrays as in `stages`.

    `axis` is that over which the tokens are sharded; the state is on every device.

    Returns:
      y [B, G, R, T, V] in the accumulation dtype.
    """
    size = q.shape[3]
    if axis is not None and segment is not None:
        segment = segment + axis.sum_before(segment[:, -1:])
    elif axis is not None and size % chunk_size:
        segment = jnp.zeros((k.shape[0], size), jnp.int32)  # which tells the padding between two devices' tokens
    queries = split(q, 3, chunk_size)
    blocks = _Block(
        k=split(k, 2, chunk_size),
        v=split(v, 2, chunk_size),
        log_decay=None if log_decay is None else split(log_decay, 2, chunk_size),
        segment=None if segment is None else split(segment + 1, 1, chunk_size) - 1,  # padding's is -1
    )
    indices = jnp.arange(queries.shape[0])
    if axis is not None:
        blocks, indices = axis.gather(blocks), indices + axis.index * queries.shape[0]
    if log_decay is None:
        blocks = blocks._replace(log_decay=jnp.zeros(blocks.k.shape[:-1], accumulation_dtype(k.dtype)))

    @jax.checkpoint
    def output(args):
        q, index = args
        own = _take(blocks, index)
        prefix = prefix_log_decay(own.log_decay)

        def visit(carry, other):
            position, block = other
            return jax.lax.cond(position < index, lambda: absorb_block(carry, block), lambda: carry), None

        def absorb_block(carry, block):
            partial, passed = carry
            logits = contract("bgrik,bgjk->bgrij", q, block.k, op.precision) * op.query_scale
            decay = (prefix + passed[..., None])[..., None] + suffix_log_decay(block.log_decay)[..., None, :]
            logits = logits + decay[:, :, None]
            if segment is not None:
                logits = jnp.where(same_segment(own.segment, block.segment)[:, None, None], logits, -jnp.inf)
            partial = _absorb(op, partial, logits, block.v)
            return partial, passed + block.log_decay.sum(-1)

        partial = _absorb(op, None, stages.exponential_logits(op, q, own.k, own.log_decay, own.segment), own.v)
        carry = partial, jnp.zeros(prefix.shape[:-1], prefix.dtype)
        (partial, passed), _ = jax.lax.scan(visit, carry, (jnp.arange(blocks.k.shape[0]), blocks), reverse=True)
        if state is not None:
            visible = None if segment is None else own.segment == 0
            logits = key_values.logits(op, q, prefix + passed[..., None], visible, state)
            partial = _absorb(op, partial, logits, state.values)
        return partial.sums.outputs(op)

    y = jax.lax.map(output, (queries, indices))
    return join(y, 3)[..., :size, :]


def _take(blocks: _Block, index) -> _Block:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)


def _absorb(op: Operation, partial: _Partial | None, logits, v) -> _Partial:
    """Adds keys with these logits [B, G, R, C, J] to a partial softmax.

    The largest logit cancels in the quotient, so its derivative is not taken. The first keys that a row sees include
    its own, so it is finite from the start.
    """
    if op.normalize:
        largest = jax.lax.stop_gradient(logits.max(-1))
        largest = largest if partial is None else jnp.maximum(partial.largest, largest)
    else:
        largest = jnp.zeros(logits.shape[:-1], logits.dtype)
    weights = jnp.exp(logits - largest[..., None])
    sums = stages.weighted_sums(op, weights, v)
    if partial is not None:
        rescale = jnp.exp(partial.largest - largest)
        sums = sums + partial.sums.scaled(rescale)
    return _Partial(largest, sums)
