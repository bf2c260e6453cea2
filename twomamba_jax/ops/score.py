"""The scores, as data: what a form, a cache or a description of a call needs to know of one stands in `SCORES`.

A finite score has features, `score(<q, k>) = <phi(q), phi(k)>`, and so a state of constant size.

`linear`: phi is the identity, D = K.

`squared`: phi(x) holds the K (K + 1) / 2 products x_a x_b, a <= b, those with a < b weighted by sqrt(2), so that
`<phi(q), phi(k)> = <q, k>^2` exactly. They are ordered by cyclic offset: for s = 0, 1, ..., K // 2 the products
x_a x_{(a + s) mod K}, a = 0, ..., K - 1 (of s = K / 2 only the first half: the second repeats it). A block of one
offset is an elementwise product of x with itself rotated, which needs neither gather nor scatter, forward or backward.

`exp` has no features: its weights are e^x, taken by way of their logarithms.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from twomamba_jax.ops.numerics import SQUARED_SHIFT, accumulation_dtype
from twomamba_jax.shapes import Array, Float

Score = Literal["linear", "squared", "exp"]


@dataclasses.dataclass(frozen=True)
class FiniteScore:
    """What a score with a state of constant size is, beyond its weights by <q, k>.

    Attributes:
      weight: score(x) of x = scale <q, k>.
      features: phi, [..., K] -> [..., D].
      entries: the entries of x whose product each feature is, in their order: K -> [(a,)] or [(a, b)], a <= b.
      degree: d with score(c x) = c^d score(x).
      has_sign: whether weights may be below 0, so that their sum is nothing to divide by unless <q, k> is not.
      shift: factor on normalised queries that leaves the quotient alone and keeps sums of weights within float32.
    """

    weight: Callable[[jax.Array], jax.Array]
    features: Callable[[jax.Array], jax.Array]
    entries: Callable[[int], list[tuple[int, ...]]]
    degree: int
    has_sign: bool = False
    shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class ScoreSpec:
    """A score.

    Attributes:
      finite: its features; None for a score that has none, and keeps all keys and values.
      chunk_size: tokens per chunk where the caller names none: the fastest power of two on two CPU cores, heads of 64.
    """

    finite: FiniteScore | None
    chunk_size: int


def symmetric_features(x: Float[Array, "... K"]) -> Float[Array, "... D"]:
    """The symmetric second-order features of x: `<phi(x), phi(y)> = <x, y>^2`."""
    size = x.shape[-1]
    weighted, doubled = x * math.sqrt(2), jnp.concatenate([x, x], axis=-1)
    blocks = [x * x]
    for offset in range(1, size // 2 + 1):
        count = size // 2 if 2 * offset == size else size
        blocks.append(weighted[..., :count] * doubled[..., offset : offset + count])
    return jnp.concatenate(blocks, axis=-1)


def symmetric_entries(size: int) -> list[tuple[int, int]]:
    """The entries whose products `symmetric_features` are."""
    pairs = []
    for offset in range(size // 2 + 1):
        count = size // 2 if 2 * offset == size else size
        pairs += [tuple(sorted((a, (a + offset) % size))) for a in range(count)]
    return pairs


SCORES: dict[Score, ScoreSpec] = {
    "linear": ScoreSpec(
        FiniteScore(lambda x: x, lambda x: x, lambda size: [(a,) for a in range(size)], degree=1, has_sign=True), 128
    ),
    "squared": ScoreSpec(
        FiniteScore(lambda x: x * x, symmetric_features, symmetric_entries, degree=2, shift=SQUARED_SHIFT), 256
    ),
    "exp": ScoreSpec(None, 256),
}
FINITE_SCORES = tuple(name for name, spec in SCORES.items() if spec.finite)


def score_spec(score: Score) -> ScoreSpec:
    """The score of that name. Raises ValueError where there is none."""
    if score not in tuple(SCORES):
        raise ValueError(f"score={score!r} is unknown: expected one of {', '.join(SCORES)}")
    return SCORES[score]


@functools.cache
def num_features(score: Score, head_dim: int) -> int:
    """D, the features of a key in the state: K for `linear`, K (K + 1) / 2 for `squared`."""
    return len(SCORES[score].finite.entries(head_dim))


def features(score: Score, x: Float[Array, "... K"]) -> Float[Array, "... D"]:
    """phi(x), in float32 or wider."""
    return SCORES[score].finite.features(x.astype(accumulation_dtype(x.dtype)))
