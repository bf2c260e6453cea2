"""What a step of decoding and a fold are, whoever computes them: their sizes, and what every kernel refuses."""

import dataclasses

import jax.numpy as jnp

SIZE = 64  # numbers of a query, a key and a value
HEADS = 4  # query heads per key/value head for which the step's kernels have registers
DEGREE = {"linear": 1, "squared": 2}  # of the features in their argument


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """What is computed, apart from the arrays.

    Attributes:
      score: "linear" or "squared".
      normalize: whether there are denominators.
      scale: s, the factor on q.
    """

    score: str
    normalize: bool
    scale: float


def unsupported_step(q, kv, heads: int) -> str | None:
    """Why no kernel reads states kv [..., D, V] with `heads` queries q [..., K] for each, or None."""
    if (q.shape[-1], kv.shape[-1]) != (SIZE, SIZE):
        return f"it has keys and values of {SIZE}, and these are of {q.shape[-1]} and {kv.shape[-1]}"
    if kv.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it reads states in float32 or bfloat16, and these are {kv.dtype}"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it computes in float32, and the queries are {q.dtype}"
    if heads > HEADS:
        return f"it has registers for {HEADS} query heads per key/value head, and these are {heads}"
    return None


def unsupported_fold(kv, keys, values) -> str | None:
    """Why no kernel folds tokens of rings [..., K] and [..., V] into states [..., D, V], or None."""
    if (keys.shape[-1], values.shape[-1]) != (SIZE, SIZE):
        found = f"{keys.shape[-1]} and {values.shape[-1]}"
        return f"it folds keys and values of {SIZE} numbers, and these have {found}"
    for name, array in (("states", kv), ("keys", keys), ("values", values)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"it folds {name} in float32 or bfloat16, and these are {array.dtype}"
    return None


def padded(slots: int) -> int:
    """The slots of a ring, up to the end of its last tile."""
    return -(-slots // SIZE) * SIZE


def plan(due, start):
    """How many rows are due; all rows, those first; and where the tokens of each begin: int32 [1 + B + B]."""
    return jnp.concatenate([due.sum()[None], jnp.argsort(~due, stable=True), start]).astype(jnp.int32)


def merged(x):
    """[L, B, G, ...] with these three as one axis."""
    return x.reshape(-1, *x.shape[3:])
