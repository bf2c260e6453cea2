"""The numerics contract in one place: dtypes of operands and sums, dot precision, and the guarded division.

`docs/numerics.md` states the contract and the figures behind it.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from twomamba_jax.shapes import AnyArray

Precision = Literal["highest"] | None

# A row whose weights sum to less than this has an output, and gradients, of exactly 0.
ZERO_DENOMINATOR = 2.0**-100

# Normalised squared scores are formed from x * 2^-12. The factor leaves the quotient alone, is exact, and moves the
# range of a row sum: scores up to 2^60 may then be summed over millions of tokens below float32's 2^128, and
# ZERO_DENOMINATOR * 2^-24 is still a normal number.
SQUARED_SHIFT = 2.0**-12


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of decay sums, normalisers, states and accumulators: float32, or wider where the input is."""
    return jnp.promote_types(dtype, jnp.float32)


def operand_dtype(dtype, precision: Precision) -> jnp.dtype:
    """The dtype in which weights and features enter a matrix product.

    It is the input's, but for `precision="highest"`, and for float16, whose range a squared score leaves at x = 256.
    """
    if precision == "highest" or dtype == jnp.float16:
        return accumulation_dtype(dtype)
    return jnp.dtype(dtype)


def broadcast_parameter(parameter: AnyArray, shape: tuple[int, ...], dtype) -> jax.Array:
    """`parameter` at every token of an array of this shape and dtype.

    Its gradient is a sum over all tokens, which in bfloat16 is 2 % off after 16,384 of them. Broadcast in float32 or
    wider and cast afterwards, it is summed in that.
    """
    wide = jnp.promote_types(parameter.dtype, accumulation_dtype(dtype))
    return jnp.broadcast_to(parameter.astype(wide), shape).astype(dtype)


def contract(equation: str, a: jax.Array, b: jax.Array, precision: Precision) -> jax.Array:
    """`einsum(equation, a, b)` summed in the accumulation dtype."""
    out = accumulation_dtype(jnp.promote_types(a.dtype, b.dtype))
    return jnp.einsum(
        equation, a, b, preferred_element_type=out, precision="highest" if precision == "highest" else None
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def divide(numerator: jax.Array, denominator: jax.Array, floor: float) -> jax.Array:
    """`numerator [..., V] / denominator [...]`, and 0 with zero gradients where the denominator is below `floor`.

    The derivative is written out as (dn - y dd) / d: the general rule forms 1 / d^2, which leaves float32's range for
    denominators that the contract allows.
    """
    return _masked_quotient(numerator, denominator, floor)


@divide.defjvp
def _divide_jvp(floor, primals, tangents):
    numerator, denominator = primals
    y = _masked_quotient(numerator, denominator, floor)
    return y, _masked_quotient(tangents[0] - y * tangents[1][..., None], denominator, floor)


def _masked_quotient(numerator, denominator, floor):
    dead = denominator < floor  # False for NaN, which goes through
    return jnp.where(dead[..., None], 0, numerator / jnp.where(dead, 1, denominator)[..., None])
