"""Whether a program computes attention: a sample of rows, and all that their gradients reach, against float64."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from attention_rows import ATTENTIONS, Row

# A rounding to bf16 errs by up to 2^-8, 0.41 * 2^-8 in the root mean square. A term of a sum has been rounded about
# four times (weights, scaled operands, their gradients), so the sum errs by 0.8 * 2^-8 times the root of its squared
# terms, by 5.3 times that at the worst of ten million entries, and by 2^-8 of itself where it is written: 6 in all.
# Below 2^-20 of the largest entry's size are float32 sums, and weights so decayed that they may count as 0.
ERROR_CONSTANT, BF16, NEGLIGIBLE = 6, 2.0**-8, 2.0**-20
CHECKED_ROWS = 64


def definition(score: str, q, k, v, log_decay, dy, rows, by_features=False) -> list[tuple[np.ndarray, np.ndarray]]:
    """y, dq, dk, dv and dlog_decay of one head in float64, each with its bound on the errors of a bf16 program.

    Arrays [T, .] and log_decay [T]. y and dq are those of `rows`, and the gradients come from these rows' outputs
    alone. by_features: the program may take <q, k>^2 for a sum of K^2 terms, as the chunked form does.
    """
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q[rows], k, v, dy[rows]))
    scale = k.shape[1] ** -0.5
    x, total = scale * q @ k.T, np.cumsum(np.asarray(log_decay, np.float64))
    decay = np.exp(np.where(np.arange(len(k)) <= rows[:, None], total[rows, None] - total, -np.inf))
    weights, slopes = {"linear": (x, x**0), "squared": (x**2, 2 * x), "exp": (np.exp(x), np.exp(x))}[score]
    decay /= (weights * decay).sum(1, keepdims=True)
    weights, slopes = weights * decay, scale * slopes * decay
    y = weights @ v
    change = dy @ v.T - (dy * y).sum(1, keepdims=True)  # the derivative with respect to a weight

    def from_each_token_on(of_rows, of_columns):
        terms = of_columns.copy()
        terms[rows] += of_rows
        return np.cumsum(terms[::-1])[::-1]

    dx, dlog = slopes * change, weights * change
    values = [y, dx @ k, dx.T @ q, weights.T @ dy, from_each_token_on(dlog.sum(1), -dlog.sum(0))]

    # The same sums of squared terms; what is a difference, or a sum of features, counts with its own terms. dlog_decay
    # is made by differences of sums over all later tokens, and may err by what is usual where it is small, too.
    lengths = [np.linalg.norm(a, axis=1, keepdims=True) for a in (dy, v, y)]
    change = abs(change) + lengths[0] * (lengths[1].T + lengths[2]) * v.shape[1] ** -0.5
    if by_features:
        terms = scale**2 * q**2 @ (k**2).T
        weights, slopes = weights + terms * decay, abs(slopes) + 2 * scale * np.sqrt(terms) * decay
    w, dx, dlog = weights**2, (slopes * change) ** 2, (weights * change) ** 2
    squares = [w @ v**2, dx @ k**2, dx.T @ q**2, w.T @ dy**2, from_each_token_on(dlog.sum(1), -dlog.sum(0))]
    squares[-1] = squares[-1] + squares[-1].mean()
    sizes = [np.sqrt(square) for square in squares]
    return [(a, ERROR_CONSTANT * BF16 * (abs(a) + s) + NEGLIGIBLE * s.max()) for a, s in zip(values, sizes)]


def error_over_bound(row: Row, program: Callable, inputs: tuple, seed: int, every_row: bool) -> float:
    """The largest error over its bound in one head of one sequence, where dy is that of the checked rows and else 0.

    NaN where any number of any head is not finite.
    """
    random = np.random.default_rng(seed)
    b, h = random.integers(row.batch), random.integers(row.heads)
    rows = np.unique([0, *random.integers(row.tokens, size=CHECKED_ROWS - 2), row.tokens - 1])
    rows = np.arange(row.tokens) if every_row else rows
    q, k, v, log_decay, dy = inputs
    got = program(q, k, v, log_decay, jnp.zeros_like(dy).at[b, rows, h].set(dy[b, rows, h]))
    if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(got)):
        return math.nan
    of_query, of_key = np.s_[b, :, h], np.s_[b, :, h * row.kv_heads // row.heads]
    decays = np.zeros(row.tokens) if log_decay is None else log_decay[of_key]
    arrays = [np.asarray(x) for x in (q[of_query], k[of_key], v[of_key], decays, dy[of_query])]
    by_features = row.score == "squared" and ATTENTIONS[row.attention].by_features
    expected = definition(row.score, *arrays, rows, by_features=by_features)
    places = [np.s_[b, rows, h]] * 2 + [of_key] * 3
    found = [(np.asarray(x[place], np.float64), *e) for x, place, e in zip(got, places, expected) if x is not None]
    return float(np.max([np.max(abs(x - value) / bound) for x, value, bound in found]))


def same_bits(first: list[jax.Array | None], second: list[jax.Array | None]) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second))
    return all(jnp.array_equal(*(x.view(f"u{x.dtype.itemsize}") for x in pair)) for pair in pairs)
