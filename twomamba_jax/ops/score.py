"""Feature maps of the finite scores: `score(<q, k>) = <phi(q), phi(k)>`.

`linear`: phi is the identity, D = K.

`squared`: phi(x) holds the K (K + 1) / 2 products x_a x_b, a <= b, those with a < b weighted by sqrt(2), so that
`<phi(q), phi(k)> = <q, k>^2` exactly. They are ordered by cyclic offset: for s = 0, 1, ..., K // 2 the products
x_a x_{(a + s) mod K}, a = 0, ..., K - 1 (of s = K / 2 only the first half: the second repeats it). A block of one
offset is an elementwise product of x with itself rotated, which needs neither gather nor scatter, forward or backward.
"""

import math
from typing import Literal

import jax.numpy as jnp

from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.shapes import Array, Float

Score = Literal["linear", "squared", "exp"]
FINITE_SCORES = ("linear", "squared")
SCORES = (*FINITE_SCORES, "exp")


def num_features(score: Score, head_dim: int) -> int:
    """D, the features of a key in the state: K for `linear`, K (K + 1) / 2 for `squared`."""
    return {"linear": head_dim, "squared": head_dim * (head_dim + 1) // 2}[score]


def features(score: Score, x: Float[Array, "... K"]) -> Float[Array, "... D"]:
    """phi(x), in float32 or wider."""
    x = x.astype(accumulation_dtype(x.dtype))
    return {"linear": lambda x: x, "squared": symmetric_features}[score](x)


def symmetric_features(x: Float[Array, "... K"]) -> Float[Array, "... D"]:
    """The symmetric second-order features of x: `<phi(x), phi(y)> = <x, y>^2`."""
    size = x.shape[-1]
    weighted, doubled = x * math.sqrt(2), jnp.concatenate([x, x], axis=-1)
    blocks = [x * x]
    for offset in range(1, size // 2 + 1):
        count = size // 2 if 2 * offset == size else size
        blocks.append(weighted[..., :count] * doubled[..., offset : offset + count])
    return jnp.concatenate(blocks, axis=-1)
