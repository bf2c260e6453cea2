"""The sum of two quotients with denominators of their own, as the kernels that read a normalised state compute it."""

import triton
import triton.language as tl


@triton.jit
def quotient(y, own_norm, sums, through, FLOOR: tl.constexpr):
    """The quotient (n y + sums) / (n + through), with log2 n = own_norm (+inf: n = 0), and log2 of its denominator.

    Where the denominator is below FLOOR they are 0 and +inf.
    """
    inside = tl.exp2(tl.where(own_norm == float("inf"), -float("inf"), own_norm))
    total = inside + through
    dead = total < FLOOR
    divisor = tl.where(dead, 1.0, total)
    y = (y * inside[:, None] + sums) * tl.where(dead, 0.0, 1.0 / divisor)[:, None]
    return y, tl.where(dead, float("inf"), tl.log2(divisor))
