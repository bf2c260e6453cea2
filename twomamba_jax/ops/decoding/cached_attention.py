"""The operation with a cache that grows token by token: prompts, pieces of them, and single tokens.

The whole cache is a pytree of arrays with a static shape: it can be the carry of a loop, be copied, saved and sharded.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops import dispatch
from twomamba_jax.ops.checks import Call, check_call
from twomamba_jax.ops.decay import clamp_log_decay
from twomamba_jax.ops.decay_attention import attend
from twomamba_jax.ops.decoding import key_value_cache, recurrent_cache
from twomamba_jax.ops.decoding.new_tokens import NewTokens
from twomamba_jax.ops.decoding.recurrent_cache import SEGMENT_EDGE, RecurrentCache, take_layer
from twomamba_jax.ops.dispatch import Form, Implementation
from twomamba_jax.ops.forms.key_values import poison_overflow, segment_start
from twomamba_jax.ops.integers import checked_integer
from twomamba_jax.ops.layout import grouped_queries, heads_first, tokens_first
from twomamba_jax.ops.numerics import Precision, accumulation_dtype
from twomamba_jax.ops.operation import make_operation
from twomamba_jax.ops.score import Score, score_spec
from twomamba_jax.ops.segments import extend_last_segment, number_segments, valid_tokens
from twomamba_jax.ops.state import KeyValueCache, init_state
from twomamba_jax.shapes import Array, Int, Keys, Lengths, LogDecay, Outputs, Queries, SegmentIds, Values

DecodingCache = RecurrentCache | KeyValueCache

# Tokens folded into a finite state at a time. At 16 the state is written for a sixteenth of what it is read, and what
# waits is 1.5 % of it (squared scores, head dim 64).
FOLD_SIZE = 16


def init_decoding_cache(
    score: Score,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    capacity: int | None = None,
    fold_size: int = FOLD_SIZE,
    rollback: bool = False,
    decay: bool = True,
    dtype=jnp.float32,
    state_dtype=jnp.float32,
) -> DecodingCache:
    """The empty cache of a score.

    Args:
      score: `linear` or `squared` give a `RecurrentCache`, `exp` a `KeyValueCache`.
      batch: B.
      num_kv_heads: G.
      head_dim: K.
      value_dim: V.
      capacity: S, the tokens that a `KeyValueCache` can hold; needed by `exp`, refused by the others.
      fold_size: r, the tokens that a finite state takes in at a time.
      rollback: whether `roll_back` will be called: a finite score then keeps a second state.
      decay: whether there is a decay. A finite score does not ask.
      dtype: of keys and values. Decays and normalisers are float32, or wider if `dtype` is.
      state_dtype: of a finite state's kv: bfloat16 halves its size, and rounds what it holds at every fold.

    Raises:
      ValueError: `capacity` missing, below 1 or given for a finite score; `fold_size` below 1.

    Examples:
      >>> cache = init_decoding_cache("exp", batch=1, num_kv_heads=2, head_dim=4, value_dim=4, capacity=32)
      >>> cache.keys.shape, cache.length.tolist()
      ((1, 2, 32, 4), [0])
    """
    fold_size = checked_integer("fold_size", fold_size)
    wide = accumulation_dtype(dtype)
    options = {"capacity": capacity, "decay": decay, "dtype": dtype}
    state = init_state(score, batch, num_kv_heads, head_dim, value_dim, **options)
    if not score_spec(score).finite:
        return state
    folded, length = jnp.zeros((2, batch), jnp.int32)
    state = state._replace(kv=state.kv.astype(state_dtype if wide == jnp.float32 else wide))
    shape = (batch, num_kv_heads, 2 * fold_size)
    return RecurrentCache(
        state,
        jax.tree.map(jnp.zeros_like, state) if rollback else None,
        keys=jnp.zeros((*shape, head_dim), dtype),
        values=jnp.zeros((*shape, value_dim), dtype),
        log_decay=jnp.zeros(shape, wide),
        folded=folded,
        length=length,
    )


def cached_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay | None,
    cache: DecodingCache,
    *,
    score: Score,
    normalize: bool = True,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
    is_empty: bool = False,
    form: Form | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    precision: Precision = None,
    partition: PartitionSpec | None = None,
) -> tuple[Outputs, DecodingCache]:
    """`decay_attention` of T tokens that continue those in `cache`, and the cache with them: `read`, then `write`.

    A prompt, a piece of it and a single token are the same call. Of a finite score r tokens at a time are folded into
    the state, and wait beside it until then: most tokens read the state and do not write it. `decay_attention_step`
    has the state alone, and writes it at every token.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, V].
      log_decay: [B, T, G], or None.
      cache: from `init_decoding_cache`, or from the call before.
      score: as the cache's.
      normalize: as in `decay_attention`, like all that is not named here.
      is_empty: promises that the cache is empty, so that a prompt is read by the fastest form there is.

    Returns:
      y [B, T, H, V] in q's dtype, and the next cache.

    Raises:
      ValueError: as `decay_attention` does; a cache of another score. A full `KeyValueCache` raises outside `jax.jit`,
        and gives NaN inside.

    Examples:
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 4))
      >>> cache = init_decoding_cache("squared", batch=1, num_kv_heads=2, head_dim=4, value_dim=4)
      >>> prompt, token = (tuple(x[:, part] for x in (q, k, v)) for part in (slice(8), slice(8, 9)))
      >>> _, cache = cached_attention(*prompt, None, cache, score="squared", is_empty=True)
      >>> y, cache = cached_attention(*token, None, cache, score="squared")
      >>> y.shape, cache.length.tolist()
      ((1, 1, 2, 4), [9])
    """
    options = {"form": form, "chunk_size": chunk_size, "normalize": normalize, "scale": scale, "is_empty": is_empty}
    both = {"score": score, "implementation": implementation, "precision": precision, "partition": partition}
    y, new = read(q, k, v, log_decay, cache, segment_ids=segment_ids, lengths=lengths, **options, **both)
    return y, write(cache, new, **both)


def read(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay | None,
    cache: DecodingCache,
    *,
    score: Score,
    normalize: bool,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
    is_empty: bool = False,
    layer: Int[Array, ""] | None = None,
    form: Form | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
    precision: Precision = None,
    partition: PartitionSpec | None = None,
) -> tuple[Outputs, NewTokens]:
    """`decay_attention` of T new tokens that continue those in `cache`; see there for the arguments.

    A finite score attends to up to r new tokens directly; one token does it all in a kernel, where there is one, which
    has no derivative. More than r go through the form and implementation that are named, or chosen. The cache is only
    read: `write` makes the next one.

    Args:
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, V].
      log_decay: [B, T, G], or None.
      cache: from `init_decoding_cache` or `write`.
      score: as the cache's.
      normalize: as in `decay_attention`, like all that is not named here.
      is_empty: promises that the cache is empty, so that forms without an initial state can be used.
      layer: which layer's cache it is where `cache` is a stack of those of all layers. A kernel reads it where it lies;
        a slice would be a copy.

    Returns:
      y [B, T, H, V] in q's dtype, and what `write` takes.

    Raises:
      ValueError: as `decay_attention` does; a cache of another score. A full `KeyValueCache` raises outside `jax.jit`,
        and gives NaN inside.
    """
    kind = RecurrentCache if score_spec(score).finite else KeyValueCache
    if not isinstance(cache, kind):
        raise ValueError(f"score={score!r} continues a {kind.__name__}, got {type(cache).__name__}")
    alone = cache if layer is None else take_layer(cache, layer)
    state = alone if kind is KeyValueCache else None
    options = {"score": score, "normalize": normalize, "scale": scale, "precision": precision}
    call = check_call(q, k, v, log_decay, segment_ids=segment_ids, lengths=lengths, state=state, **options)
    batch, size = q.shape[:2]
    counts = jnp.full((batch,), size, jnp.int32) if call.lengths is None else call.lengths
    segment_ids = extend_last_segment(call.segment_ids, call.lengths)
    segment = None if segment_ids is None else number_segments(segment_ids)
    options = {"form": form, "chunk_size": chunk_size, "implementation": implementation, "partition": partition}
    whole = functools.partial(attend, **options)
    if kind is RecurrentCache:
        few = functools.partial(recurrent_cache.read, call.op, cache=alone)
        if size <= alone.fold_size:

            def ask(kernels):
                return kernels.unsupported_in_cache(q, k, alone.state)

            chosen = dispatch.choose_implementation(implementation, "cached", ask)
            if chosen != "xla":
                in_kernel = dispatch.load(chosen).read_cache
                few = functools.partial(in_kernel, call.op, cache=cache, layer=layer, partition=partition)
        y, new = _attend_finite(call, whole, few, segment, counts, alone, is_empty)
    else:
        y, new = _attend_exponential(call, whole, segment, counts, is_empty)
    if lengths is not None:
        y = jnp.where(valid_tokens(counts, size)[..., None, None], y, 0)
    return y, new


def write(
    cache: DecodingCache,
    new: NewTokens,
    *,
    score: Score,
    implementation: Implementation | None = None,
    precision: Precision = None,
    partition: PartitionSpec | None = None,
) -> DecodingCache:
    """The cache with what `read` returned; in a finite score's, r tokens that have waited are folded.

    An axis may lead, as of layers in a stack. No reverse derivative, since how often it folds depends on the lengths;
    of the kernel none at all.

    Args:
      cache: what `read` read.
      new: what it returned.
      score: as the cache's.
      implementation: `xla` folds with XLA, any other with a kernel where there is one for it, in float32 whatever the
        precision.
      precision: as in `decay_attention`.
      partition: as in `decay_attention`.

    Raises:
      ValueError: an unknown implementation.
    """
    dispatch.check_name(implementation)
    if isinstance(cache, KeyValueCache):
        return key_value_cache.write(new, cache, partition)
    op = make_operation(cache.keys.shape[-1], score, True, None, precision)
    arrays = cache.state.kv, cache.keys, cache.values
    kernels, fold = implementation or dispatch.kernels_of_device(), None
    if kernels != "xla":

        def ask(kernels):
            return kernels.unsupported_fold(*arrays, cache.fold_size)

        if dispatch.refusal(kernels, ask) is None:
            fold = functools.partial(dispatch.load(kernels).fold, op)
    return recurrent_cache.write(op, new, cache, partition, fold)


def roll_back(cache: DecodingCache, counts, partition: PartitionSpec | None = None) -> DecodingCache:
    """The cache without its last `counts [B]` tokens: a finite score's last r at most, and only with `rollback`.

    What follows has the bits that it would have had if those tokens had never been there, whatever they held. An axis
    may lead, as of layers in a stack; `partition` is as in `write`. Numbers are not checked; the start of a packed
    prompt's last document is as far back as this can go.
    """
    if isinstance(cache, KeyValueCache):
        return key_value_cache.roll_back(counts, cache, partition)
    if cache.previous is None:
        raise ValueError("this cache keeps one state only and cannot be rolled back: make it with rollback=True")
    return recurrent_cache.roll_back(counts, cache)


def _attend_finite(call: Call, whole, few, segment, counts, cache: RecurrentCache, is_empty: bool):
    """y and the new tokens; `whole(call)` attends to any number of them, `few(*arrays)` to at most r."""
    op, q, k, v, log_decay, *_ = call
    wide = cache.log_decay.dtype
    decays = jnp.zeros(k.shape[:3], wide) if log_decay is None else clamp_log_decay(log_decay, q.dtype)
    if segment is not None:
        edges = segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
        decays = jnp.where(edges[..., None], SEGMENT_EDGE, decays)
    # Zero keys and no decay: padding changes no state. Valid tokens never see it.
    valid = valid_tokens(counts, k.shape[1])
    keys, values = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
    arrays = heads_first(q, keys, values, jnp.where(valid[..., None], decays, 0).astype(wide))

    if q.shape[1] <= cache.fold_size:
        y = few(*arrays)
        new = NewTokens(*arrays[1:], jnp.zeros_like(counts), counts)
    else:

        def attend_all(lengths, state):
            part = call._replace(lengths=lengths, state=None if is_empty else state)
            y, state = whole(part, return_final_state=True)
            return grouped_queries(y, k.shape[2]), state

        y, new = recurrent_cache.read_many(op, attend_all, *arrays, counts, cache)
    return tokens_first(y).astype(q.dtype), new


def _attend_exponential(call: Call, whole, segment, counts, is_empty: bool):
    """y and the new tokens; `whole(call)` attends to them and to the cache."""
    _, q, k, v, log_decay, *_, cache = call
    part = call._replace(lengths=counts, state=None if is_empty else cache)
    y = poison_overflow(whole(part, return_final_state=False)[0], cache, counts)
    _, *arrays = heads_first(q, k, v, clamp_log_decay(log_decay, q.dtype))
    return y, NewTokens(*arrays, jnp.zeros_like(counts), counts, start=segment_start(segment, cache))
