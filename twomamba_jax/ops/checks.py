"""Argument checks of the operation: what was wrong, what was expected, what to do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.ops.known import known
from twomamba_jax.ops.operation import Operation, make_operation
from twomamba_jax.ops.state import FiniteState, KeyValueCache, State, init_state


class Call(NamedTuple):
    """A call of the operation whose arguments fit each other: what it computes, and its arrays, JAX's or None."""

    op: Operation
    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    segment_ids: jax.Array | None
    lengths: jax.Array | None
    state: State | None


def check_call(
    q, k, v, log_decay, *, score, normalize, scale, precision, segment_ids=None, lengths=None, state=None
) -> Call:
    """All checks of a call's arguments, which are those of `decay_attention`. Raises ValueError."""
    q, k, v, log_decay = as_arrays(q, k, v, log_decay)
    check_arrays(q, k, v, log_decay)
    op = make_operation(q.shape[-1], score, normalize, scale, precision)
    segment_ids, lengths = as_rows(q.shape, segment_ids, lengths)
    state = jax.tree.map(jnp.asarray, state)
    check_state(op, q, k, v, log_decay, state, lengths)
    return Call(op, q, k, v, log_decay, segment_ids, lengths, state)


def check_arrays(q, k, v, log_decay) -> None:
    """Shapes and dtypes of `[B, T, heads, dim]` arrays fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, dim], got shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got dtype {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must share one dtype, got q {q.dtype} and {name} {x.dtype}: cast them first")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"{name} has [B, T] = {x.shape[:2]}, but q has {q.shape[:2]}")
    if q.shape[1] < 1:
        raise ValueError(f"there must be at least one token, got q of shape {q.shape}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q and k must share their head dimension, got {q.shape[-1]} and {k.shape[-1]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must have the same heads, got {k.shape[2]} and {v.shape[2]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads")
    if log_decay is not None:
        if log_decay.shape != k.shape[:3]:
            raise ValueError(f"log_decay must be [B, T, G] = {k.shape[:3]}, got {log_decay.shape}")
        if log_decay.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"log_decay must be float32 or float64, got {log_decay.dtype}: sums of decays need the precision"
            )


def as_arrays(*arrays):
    """The same as JAX arrays: NumPy's, such as a restored checkpoint's, lack some methods. None stays None."""
    return tuple(None if x is None else jnp.asarray(x) for x in arrays)


def as_rows(shape: tuple[int, ...], segment_ids, lengths, shortest: int = 0):
    """Segment ids [B, T] and lengths [B] of rows `shape` [B, T, ...] as JAX arrays of integers; None stays None.

    Raises ValueError for another shape, no integers, or lengths that are known and not from `shortest` to T.
    """
    for name, x, expected in (("segment_ids", segment_ids, shape[:2]), ("lengths", lengths, shape[:1])):
        if x is None:
            continue
        if np.shape(x) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {np.shape(x)}")
        dtype = x.dtype if isinstance(x, jax.Array) else np.asarray(x).dtype
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got dtype {dtype}")
    if lengths is not None and known(lengths):
        # NumPy, not jnp: inside jax.jit even operations on constants would be staged.
        counts = np.asarray(lengths)
        if ((counts < shortest) | (counts > shape[1])).any():
            raise ValueError(f"lengths={counts.tolist()} must be from {shortest} to the {shape[1]} tokens of a row")
    segment_ids, lengths = as_arrays(segment_ids, lengths)
    return segment_ids, None if lengths is None else lengths.astype(jnp.int32)


def check_state(op: Operation, q, k, v, log_decay, state, lengths) -> None:
    """The state is of the score's kind, has the right shapes, and room for the new tokens where that is known."""
    if state is None:
        return
    kind = FiniteState if op.finite else KeyValueCache
    if not isinstance(state, kind):
        raise ValueError(f"score={op.score!r} continues a {kind.__name__}, got {type(state).__name__}")
    if not op.finite and (state.start.ndim > 1 or state.keys.shape[1] != k.shape[2] == state.keys.shape[2]):
        raise ValueError(
            f"the key/value cache must be heads first, [B, G, S, .] with G = {k.shape[2]}, got keys of shape "
            f"{state.keys.shape}: if it is of an earlier version, tokens first and with log_weights, read its prompt "
            "again"
        )
    options = {} if op.finite else {"capacity": state.keys.shape[2], "decay": state.log_decay is not None}
    expected = jax.eval_shape(lambda: init_state(op.score, q.shape[0], k.shape[2], k.shape[3], v.shape[3], **options))
    for name, want, got in zip(kind._fields, expected, state):
        if want is not None and got.shape != want.shape:
            raise ValueError(f"the state's {name} must have shape {want.shape} for these q, k and v, got {got.shape}")
    if op.finite:
        return
    if state.log_decay is None and log_decay is not None:
        raise ValueError(
            "the key/value cache was made with decay=False, and log_decay is given: make it with init_state(..., "
            "decay=True), or a model's with init_cache of its config"
        )
    if known(state.length, lengths):
        counts = q.shape[1] if lengths is None else np.asarray(lengths)
        longest = int(np.max(np.asarray(state.length) + counts, initial=0))
        if longest > options["capacity"]:
            raise ValueError(
                f"the key/value cache holds {options['capacity']} tokens and would need {longest}: make it larger with "
                "init_state(..., capacity=...)"
            )
