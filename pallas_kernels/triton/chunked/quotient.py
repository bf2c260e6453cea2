"""The sum of two quotients with denominators of their own, as the kernels that read a normalised state compute it."""

import triton
import triton.language as tl


@triton.jit
def quotient(y, own_norm, sums, through, FLOOR: tl.constexpr):
    """(n y + sums) / (n + through) and log2 of the denominator, with log2 n = own_norm (+inf: n = 0); 0 and +inf where
    the denominator is below FLOOR."""
    inside = tl.exp2(tl.where(own_norm == float("inf"), -float("inf"), own_norm))
    total = inside + through
    dead = total < FLOOR
    y = (y * inside[:, None] + sums) * tl.where(dead, 0.0, 1.0 / total)[:, None]
    return y, tl.where(dead, float("inf"), tl.log2(total))
