"""The public operation, and its single step."""

import functools
from typing import Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops import dispatch
from twomamba_jax.ops.checks import Call, as_arrays, check_call
from twomamba_jax.ops.decay import clamp_log_decay
from twomamba_jax.ops.dispatch import Form, Implementation
from twomamba_jax.ops.forms import key_values, recurrent
from twomamba_jax.ops.forms.parallel import final_state
from twomamba_jax.ops.integers import Integer, checked_integer
from twomamba_jax.ops.layout import heads_first, tokens_first
from twomamba_jax.ops.numerics import Precision
from twomamba_jax.ops.score import Score
from twomamba_jax.ops.segments import extend_last_segment, number_segments, valid_tokens
from twomamba_jax.ops.sharding import sequence_axis, shard_call
from twomamba_jax.ops.state import KeyValueCache, State, init_state
from twomamba_jax.shapes import (
    AnyArray,
    Array,
    Float,
    Float32,
    Float64,
    Keys,
    Lengths,
    LogDecay,
    Outputs,
    Queries,
    SegmentIds,
    Values,
)


class Options(TypedDict, total=False):
    """The keywords of `decay_attention` on which the type of its result does not depend."""

    score: Score
    normalize: bool
    scale: float | None
    segment_ids: SegmentIds | None
    lengths: Lengths | None
    initial_state: State | None
    form: Form | None
    chunk_size: Integer | None
    implementation: Implementation | None
    precision: Precision
    partition: PartitionSpec | None


@overload
def decay_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    return_final_state: Literal[False] = False,
    **options: Unpack[Options],
) -> Outputs: ...


@overload
def decay_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    return_final_state: Literal[True],
    **options: Unpack[Options],
) -> tuple[Outputs, State]: ...


@overload
def decay_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    return_final_state: bool,
    **options: Unpack[Options],
) -> Outputs | tuple[Outputs, State]: ...


def decay_attention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay | None = None,
    *,
    score: Score = "squared",
    normalize: bool = True,
    scale: float | None = None,
    segment_ids: SegmentIds | None = None,
    lengths: Lengths | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    form: Form | None = None,
    chunk_size: Integer | None = None,
    implementation: Implementation | None = None,
    precision: Precision = None,
    partition: PartitionSpec | None = None,
) -> Outputs | tuple[Outputs, State]:
    """Causal attention with a decay, for any of the paper's scores.

    With a_t = log_decay and A_t = a_0 + ... + a_t, for every query head:

        x_ij = scale <q_i, k_j>
        w_ij = score(x_ij) exp(A_i - A_j)    for j <= i in the same segment, else 0
        y_i  = sum_j w_ij v_j / sum_j w_ij   (without the division if not `normalize`)

    score: `linear` x (Mamba-2, linear attention), `squared` x^2 (2Mamba, Algorithm 5), `exp` e^x (2Mamba-E; softmax
    attention without a decay).

    Args:
      q: queries [B, T, H, K], bfloat16, float16, float32 or float64.
      k: keys [B, T, G, K]; H % G == 0, and query head h reads head h // (H // G).
      v: values [B, T, G, V].
      log_decay: [B, T, G], natural log of the decay of each token, <= 0; float32 or float64, summed in float32
        or q's wider dtype. None: no decay. Below -128 it acts as -128, which is 0 in float32.
      score: `linear`, `squared` or `exp`. `linear` with `normalize` asks for non-negative `<q, k>`.
      normalize: whether rows are divided by the sum of their weights. A row whose weights sum to less than 2^-100 is
        0, and so are its gradients.
      scale: factor on `<q, k>`; None is 1 / sqrt(K).
      segment_ids: [B, T] integers; a maximal run of equal ids is a segment, and nothing crosses its edge.
      lengths: [B] integers, the tokens that count in each (right-padded) row. Outputs at padding are 0, and padding,
        which may hold anything, enters no state and no gradient.
      initial_state: the state of the tokens before, as returned by an earlier call or by `init_state`. It continues
        into the segment of token 0. A key/value cache without log decays takes no tokens with a decay.
      return_final_state: whether to return the state after the last token too: that of the last segment. For `exp`
        without an initial state it is a cache of capacity T, without log decays where `log_decay` is None.
      form: `parallel` is quadratic in T. `chunked` is linear in T (for `exp`: quadratic in time, linear in memory).
        `recurrent` holds T states, for small T and K; `exp` has none. None chooses by T, K, V and score.
      chunk_size: tokens per chunk, of the chunked form, which it asks for where `form` is None; None chooses.
      implementation: `xla`, or kernels, `mosaic_gpu` for Hopper GPUs and `triton` for NVIDIA GPUs of compute capability
        8.0 and later, for bfloat16 (`triton`: also float16 for `exp`, normalised) and heads of 64 or 128, the larger of
        K and V, to which the other is padded; of the chunked form for `linear`, in chunks of a multiple of 128 tokens,
        and for `squared` with heads of 64, in chunks of a multiple of 256 or, `triton`, of 128. None: the kernels for
        this GPU where they support the call, and XLA elsewhere; said once in the log.
      precision: None uses weights and features in q's dtype (float16 in float32, but in `triton`) and JAX's default
        product precision; `highest` computes everything in float32 or wider. Denominators and states are always float32
        or wider.
      partition: the mesh axes over which q [B, T, H, K] is sharded, and so k, v and the result, where a mesh is set
        (`jax.set_mesh`). A kernel runs on each device's batch entries and heads; XLA needs no hint for these. Where the
        tokens are sharded too, each device computes its slice, by any implementation. Of a finite score devices pass on
        a state, 1 + log2(n) messages of it whatever T is; `parallel` then takes all tokens of a device at once. For
        `exp` each gathers all T keys, values and log decays (docs/sharding.md has the bytes). An initial state is that
        before the first device's tokens.

    Returns:
      y [B, T, H, V] in q's dtype; with `return_final_state`, also the state.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown score, form or implementation, a form or implementation
        that cannot compute this call, sizes that are no multiple of the devices that they are sharded over, a cache
        without room for T tokens (inside `jax.jit`, where that cannot be raised, the rows that overflow are NaN).

    Examples:
      >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
      >>> attend = jax.jit(decay_attention, static_argnames="return_final_state")
      >>> y, state = attend(q, k, v, return_final_state=True)
      >>> y.shape, state.kv.shape
      ((1, 5, 2, 4), (1, 2, 10, 4))
    """
    call = check_call(
        q,
        k,
        v,
        log_decay,
        score=score,
        normalize=normalize,
        scale=scale,
        precision=precision,
        segment_ids=segment_ids,
        lengths=lengths,
        state=initial_state,
    )
    options = {"form": form, "chunk_size": chunk_size, "implementation": implementation, "partition": partition}
    y, final = attend(call, return_final_state=return_final_state, **options)
    return (y, final) if return_final_state else y


def attend(
    call: Call,
    *,
    return_final_state: bool,
    form: Form | None,
    chunk_size: Integer | None,
    implementation: Implementation | None,
    partition: PartitionSpec | None,
) -> tuple[Outputs, State | None]:
    """`decay_attention` of a call that is checked: y, and the final state if it is wanted."""
    op, q, k, v, log_decay, segment_ids, lengths, state = call
    chunk_size = checked_integer("chunk_size", chunk_size, or_none=True)
    axis = sequence_axis(partition)
    form, implementation = dispatch.choose(op, q, k, v, state, axis, form, chunk_size, implementation)

    batch, size = q.shape[:2]
    segment_ids = extend_last_segment(segment_ids, lengths)
    counts = jnp.full((batch,), size, jnp.int32) if lengths is None else lengths
    log_decay = clamp_log_decay(log_decay, q.dtype)
    if lengths is not None:
        # Zero keys and no decay: padding changes no finite state. Valid tokens never see it. Queries too: where padding
        # is NaN, the gradient of a key would be a sum over all queries with 0 times NaN in it.
        valid = valid_tokens(lengths, size)
        q, k, v = (jnp.where(valid[..., None, None], x, 0) for x in (q, k, v))
        log_decay = None if log_decay is None else jnp.where(valid[..., None], log_decay, 0)

    # XLA shards by itself what does not go along the tokens; a kernel is not partitioned by the compiler.
    on_mesh = None if implementation == "xla" and axis is None else partition
    local = functools.partial(dispatch.load(implementation).attend, op, form, chunk_size, return_final_state)
    y, final = shard_call(local, on_mesh, q, k, v, log_decay, segment_ids, state)
    if return_final_state and final is None:
        final = _state_after(op, k, v, log_decay, segment_ids, counts, state)
    if lengths is not None:
        y = jnp.where(valid[..., None, None], y, 0)
    if isinstance(state, KeyValueCache):
        y = key_values.poison_overflow(y, state, counts)
    return y, final


def decay_attention_step(
    q: Float[AnyArray, "B H K"],
    k: Float[AnyArray, "B G K"],
    v: Float[AnyArray, "B G V"],
    log_decay: Float32[AnyArray, "B G"] | Float64[AnyArray, "B G"] | None,
    state: State,
    *,
    score: Score,
    normalize: bool,
    scale: float | None = None,
    implementation: Implementation | None = None,
    precision: Precision = None,
) -> tuple[Float[Array, "B H V"], State]:
    """One token of `decay_attention` (Algorithm 6): attends to the state and to itself, and returns the next state.

    The arguments are those of `decay_attention` without their T axis. A key/value cache that is full gives NaN.

    Returns:
      y [B, H, V] in q's dtype, and the state with the token in it.

    Raises:
      ValueError: shapes, dtypes or a state that do not fit; a full cache, outside `jax.jit`.

    Examples:
      >>> q = k = v = jnp.ones((1, 2, 4))
      >>> state = init_state("linear", batch=1, num_kv_heads=2, head_dim=4, value_dim=4)
      >>> y, state = decay_attention_step(q, k, v, None, state, score="linear", normalize=False)
      >>> y[0, 0].tolist()  # <q, k> / sqrt(4), times the first token's own v
      [2.0, 2.0, 2.0, 2.0]
    """
    q, k, v, log_decay = as_arrays(q, k, v, log_decay)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [B, heads, dim], one token without a T axis, got shape {x.shape}")
    if log_decay is not None and log_decay.ndim != 2:
        raise ValueError(f"log_decay must be [B, G], one token without a T axis, got shape {log_decay.shape}")
    q, k, v, log_decay = (None if x is None else x[:, None] for x in (q, k, v, log_decay))
    options = {"score": score, "normalize": normalize, "scale": scale, "precision": precision}
    op, q, k, v, log_decay, _, _, state = check_call(q, k, v, log_decay, state=state, **options)
    dispatch.choose_implementation(implementation, "step", lambda kernels: "it has no form for a single token")
    y, new_state = recurrent.step(op, *heads_first(q, k, v, clamp_log_decay(log_decay, q.dtype)), state)
    y = tokens_first(y)[:, 0].astype(q.dtype)
    if isinstance(state, KeyValueCache):
        y = key_values.poison_overflow(y, state, jnp.ones((q.shape[0],), jnp.int32))
    return y, new_state


def _state_after(op, k, v, log_decay, segment_ids, counts, state):
    """The state after the last token, for a form that does not compute it on the way."""
    _, k, v, log_decay = heads_first(k, k, v, log_decay)
    segment = None if segment_ids is None else number_segments(segment_ids)
    if op.finite:
        return final_state(op, k, v, log_decay, segment, state)
    if state is None:
        options = {"capacity": k.shape[2], "decay": log_decay is not None, "dtype": k.dtype}
        state = init_state("exp", k.shape[0], k.shape[1], k.shape[3], v.shape[3], **options)
    return key_values.write(k, v, log_decay, key_values.segment_start(segment, state), counts, state)
