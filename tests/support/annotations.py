"""What the annotations of the library are checked with.

jaxtyping makes two functions of each: one with its parameters and Any for a result, called before it, and one with its
parameters and its result, called after it. The first is left alone: what a function refuses, it says itself. What it
accepts has to be what its annotations say; where none says what it returns, nothing is checked.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# Where annotations are of arrays. A configuration says itself what it does not take.
CHECKED = (
    *(f"twomamba_jax.{name}" for name in ("ops", "layers", "generation", "sampling", "shapes")),
    "train.cross_entropy",
)

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an integer is a float


def check(function: Callable) -> Callable:
    """`function` with beartype's checks, if it is the one called after."""
    return function if function.__annotations__.get("return") is Any else _check(function)
