"""What a finite score keeps while it decodes: a state, and a ring of the latest tokens that are not in it yet.

The state is large and a token is small. So new tokens wait in the ring, where they are attended to directly, and r of
them are folded into the state at a time: it is read once per token and written once in r. Folds end at multiples of r,
whatever the calls were, so that what a row computes depends on its own tokens alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops import recurrence
from twomamba_jax.ops.decay import suffix_log_decay
from twomamba_jax.ops.decoding.new_tokens import NewTokens
from twomamba_jax.ops.forms import stages
from twomamba_jax.ops.forms.parallel import parallel
from twomamba_jax.ops.operation import Operation
from twomamba_jax.ops.sharding import shard_stack
from twomamba_jax.ops.slots import put_tokens
from twomamba_jax.ops.state import FiniteState
from twomamba_jax.shapes import Array, Float, Int

# The log decay of a segment's first token, as the tokens before it feel it: exp of this is 0 in float64 too.
SEGMENT_EDGE = -1024.0


class RecurrentCache(NamedTuple):
    """The state after token `folded` - 1, and the keys, values and log decays of the tokens from there up to `length`.

    Token t lies in slot t mod 2r. `previous` (None where nothing is ever rolled back) is the state r tokens before
    `state`.
    """

    state: FiniteState
    previous: FiniteState | None
    keys: Float[Array, "B G 2r K"]
    values: Float[Array, "B G 2r V"]
    log_decay: Float[Array, "B G 2r"]
    folded: Int[Array, "B"]
    length: Int[Array, "B"]

    @property
    def fold_size(self) -> int:
        """r, the tokens folded at a time."""
        return self.keys.shape[-2] // 2


def take_layer(stack: RecurrentCache, layer) -> RecurrentCache:
    """The cache of one layer in a stack of those of all layers, which lead."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)


def read(op: Operation, q, k, v, log_decay, cache: RecurrentCache):
    """T <= r new tokens: to the state, to the ring, and to each other; heads-first arrays as in `stages`.

    Returns:
      y [B, G, R, T, V] in the accumulation dtype.
    """
    size = cache.fold_size - 1  # r tokens never wait
    waiting = _tokens(cache, cache.length - size, size)
    keys, values, decays = (
        jnp.concatenate([old.astype(new.dtype), new], axis=2) for old, new in zip(waiting, (k, v, log_decay))
    )
    since_fold = log_decay.at[:, :, 0].add(waiting.log_decay.sum(-1))
    through_state = stages.query(op, q, since_fold, None, cache.state)
    return (stages.intra(op, q, keys, values, decays, None) + through_state).outputs(op)


def waiting_decays(log_decay, cache: RecurrentCache, size: int):
    """The log decays [B, G, size] of the tokens that wait, each in its slot of the ring, and 0 elsewhere.

    One new token, whose `log_decay` is [B, G, 1], waits as well. `size` may go beyond the ring.
    """
    slots = jnp.arange(size)[None]
    capacity, newest = cache.keys.shape[2], cache.length[:, None]
    position = newest - (newest - slots) % capacity  # of the latest token that belongs into a slot
    waits = (slots < capacity) & (position >= cache.folded[:, None])
    ring = jnp.pad(cache.log_decay, ((0, 0), (0, 0), (0, size - capacity)))
    return jnp.where(waits[:, None], jnp.where((position == newest)[:, None], log_decay, ring), 0)


def read_many(op: Operation, attend_all, q, k, v, log_decay, counts, cache: RecurrentCache):
    """More than r new tokens, of which `counts [B]` count in each row; heads-first arrays as in `stages`.

    All but the last r to 2r - 1 tokens go through `attend_all(lengths, state) -> (y, state)`, the whole-sequence form;
    those last ones attend to the state that it ends in, and go into the ring.

    Returns:
      y [B, G, R, T, V] in the accumulation dtype, and the new tokens with the state that precedes them.
    """
    start, fold = cache.length, cache.fold_size
    target = jnp.maximum((start + counts) // fold * fold - fold, cache.folded)
    lengths = jnp.maximum(target - start, 0)
    y, state = attend_all(lengths, _state_now(op, cache))

    tail = lengths[:, None] + jnp.arange(2 * fold - 1)[None]
    counted = tail < counts[:, None]

    def last(x, axis):
        taken = _take(x, jnp.minimum(tail, k.shape[2] - 1), axis)
        return jnp.where(_along(counted, x.ndim, axis), taken, 0)

    keys, values, decays = last(k, 2), last(v, 2), last(log_decay, 2)
    y_tail = parallel(op, last(q, 3), keys, values, decays, None, state)
    put = jax.vmap(lambda row, at, new: row.at[:, :, at].set(new, mode="drop"))  # no row needs another's device
    y = put(y, jnp.where(counted, tail, y.shape[3]), y_tail.astype(y.dtype))

    moved = target > start
    state = jax.tree.map(lambda new, old: _where(moved, new.astype(old.dtype), old), state, cache.state)
    return y, NewTokens(keys, values, decays, lengths, counted.sum(1), state, target)


def write(
    op: Operation, new: NewTokens, cache: RecurrentCache, partition: PartitionSpec | None, fold: Callable | None = None
) -> RecurrentCache:
    """The cache with the new tokens in its ring, and the oldest r folded in the rows in which that many wait.

    An axis may lead, as of layers in a stack. `partition` is as in `decay_attention`, `fold` as in `_fold`.
    """
    if cache.length.ndim == 1:
        stack = write(op, *jax.tree.map(lambda x: x[None], (new, cache)), partition, fold)
        return jax.tree.map(lambda x: x[0], stack)
    # XLA, left to itself, gives every device the new tokens of all.
    return shard_stack(lambda new, cache: _fold(op, fold, _extend(new, cache)), partition, new, cache)


def _extend(new: NewTokens, stack: RecurrentCache) -> RecurrentCache:
    capacity, index = stack.keys.shape[3], jnp.arange(new.keys.shape[3])[None, None]
    first = stack.length + new.skipped
    slots = jnp.where(index < new.counts[..., None], (first[..., None] + index) % capacity, capacity)
    return stack._replace(
        state=stack.state if new.state is None else new.state,
        keys=put_tokens(stack.keys, new.keys, slots),
        values=put_tokens(stack.values, new.values, slots),
        log_decay=put_tokens(stack.log_decay, new.log_decay, slots),
        folded=stack.folded if new.folded is None else new.folded,
        length=first + new.counts,
    )


def roll_back(counts, cache: RecurrentCache) -> RecurrentCache:
    """The cache without its last `counts [B]` tokens, at most r of them; it needs `previous`. An axis may lead."""
    length = cache.length - jnp.broadcast_to(counts, cache.length.shape)
    crossed = length < cache.folded
    state = jax.tree.map(lambda old, now: _where(crossed, old, now), cache.previous, cache.state)
    return cache._replace(state=state, folded=cache.folded - jnp.where(crossed, cache.fold_size, 0), length=length)


def _fold(op: Operation, fold: Callable | None, stack: RecurrentCache) -> RecurrentCache:
    """Folds what is due in a stack of layers [L, B, ...] that have seen the same tokens; in place.

    `fold(state, previous, keys, values, start, log_weights, log_carry, due)` is as in `pallas_kernels.decoding.fold`;
    None folds by XLA.
    """
    due = (stack.length - stack.folded >= stack.fold_size)[0]
    if fold is None:
        state, previous = _fold_rows(op, stack, due)
    else:
        start = stack.folded % (2 * stack.fold_size)  # 0 or r
        halves = jnp.split(stack.log_decay, 2, axis=-1)
        log_decay = jnp.where((start == 0)[..., None, None], *halves)
        weights = suffix_log_decay(log_decay), log_decay.sum(-1)
        state, previous = fold(stack.state, stack.previous, stack.keys, stack.values, start[0], *weights, due)
    return stack._replace(
        state=state, previous=previous, folded=stack.folded + jnp.where(due, stack.fold_size, 0)[None]
    )


def _fold_rows(op: Operation, stack: RecurrentCache, due):
    """The states after the tokens in the rows `due [B]`, and those before them; row by row.

    A row that is not due is not touched; and what is added to a state is as large as it, so never made for all rows.
    """
    order = jnp.argsort(~due)
    rest = stack._replace(state=None, previous=None)

    def fold_row(i, states):
        def take(x):
            return jax.lax.dynamic_slice_in_dim(x, order[i], 1, axis=1)

        def put(x, new):
            return jax.lax.dynamic_update_slice_in_dim(x, new, order[i], axis=1)

        def fold(state, tokens):
            return _advance(op, state, *_tokens(tokens, tokens.folded, stack.fold_size))

        state = jax.tree.map(take, states[0])
        folded = jax.vmap(fold)(state, jax.tree.map(take, rest))
        return jax.tree.map(put, states, (folded, state)[: len(states)])

    states = (stack.state,) if stack.previous is None else (stack.state, stack.previous)
    state, *previous = jax.lax.fori_loop(0, due.sum(), fold_row, states)
    return state, previous[0] if previous else None


def _state_now(op: Operation, cache: RecurrentCache) -> FiniteState:
    """The state after every token so far."""
    return _advance(op, cache.state, *_tokens(cache, cache.folded, cache.fold_size - 1))


def _advance(op: Operation, state: FiniteState, k, v, log_decay) -> FiniteState:
    added = stages.update(op, k, v, log_decay, None)
    after = recurrence.advance(state, stages.carry_weight(log_decay, None, added.kv.dtype), added)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)


class _Tokens(NamedTuple):
    """Keys [B, G, N, K], values [B, G, N, V] and log decays [B, G, N]."""

    keys: jax.Array
    values: jax.Array
    log_decay: jax.Array


def _tokens(cache: RecurrentCache, start, size: int) -> _Tokens:
    """The tokens `start [B]`, ..., `start` + size - 1: zeros for those in the state already, or not yet there."""
    positions = start[:, None] + jnp.arange(size)[None]
    waiting = (positions >= cache.folded[:, None]) & (positions < cache.length[:, None])

    def take(ring):
        taken = _take(ring, positions % (2 * cache.fold_size), 2)
        return jnp.where(_along(waiting, ring.ndim, 2), taken, 0)

    return _Tokens(take(cache.keys), take(cache.values), take(cache.log_decay))


def _take(x, index, axis: int):
    """The entries `index [B, N]` along `axis` of x [B, ...]."""
    return jnp.take_along_axis(x, _along(index, x.ndim, axis), axis=axis)


def _along(x, ndim: int, axis: int):
    """[B, N] as an array of `ndim` axes, N at `axis`."""
    shape = [1] * ndim
    shape[0], shape[axis] = x.shape
    return x.reshape(shape)


def _where(rows, new, old):
    """`new` where `rows [..., B]` is True."""
    return jnp.where(rows.reshape(*rows.shape, *[1] * (new.ndim - rows.ndim)), new, old)
