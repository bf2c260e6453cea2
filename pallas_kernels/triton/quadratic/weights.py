"""The weights of a tile of pairs, and their slopes: what both passes and both directions share."""

import triton
import triton.language as tl


@triton.jit
def exponents(s, row, column, LOGIT_SCALE: tl.constexpr):
    """log2 of the weights of `exp`, from the products s and what rows and columns add, or None."""
    exponent = s * LOGIT_SCALE
    if column is not None:
        exponent += column[None, :]
    if row is not None:
        exponent += row[:, None]
    return exponent


@triton.jit
def slope_of(
    s,
    row,
    column,
    seen,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
):
    """d weight / d s of a tile of pairs up to a constant, as `quadratic.operands.slope_of`: for `exp` the weight.

    Args:
      s: products of queries and keys, float32.
      row, column: log2 of what multiplies the score, of the rows and of the columns; None is 0. Scores that are powers
        have a row only where it must be added to the column before the exponential, and then `seen` too.
      seen: which pairs count; None: all.
      SCORE: of the problem.
      NORMALIZE: whether no weight of `exp` is to exceed 1.
      SCORE_SCALE: the score of 1, of a power; `query_power` is in it, not in s.
      LOGIT_SCALE: of the problem.
    """
    if SCORE == "exp":
        exponent = exponents(s, row, column, LOGIT_SCALE)
        if NORMALIZE:
            exponent = tl.minimum(exponent, 0.0)  # logits of 2^60 differ by more than they are apart
        if seen is not None:
            exponent = tl.where(seen, exponent, -float("inf"))
        return tl.exp2(exponent)
    if row is not None:
        factor = tl.exp2(tl.where(seen, row[:, None] + column[None, :], -float("inf"))) * SCORE_SCALE
    else:
        factor = tl.full((1, 1), SCORE_SCALE, tl.float32)
        if column is not None:
            factor *= tl.exp2(column)[None, :]
        if seen is not None:
            factor = tl.where(seen, factor, 0.0)
    if SCORE == "squared":
        factor = factor * s
    return factor


@triton.jit
def weights_of(slope, s, SCORE: tl.constexpr):
    """The weights that go with `slope_of`."""
    if SCORE == "exp":
        return slope
    return slope * s
