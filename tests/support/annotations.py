"""What the annotations of the library are checked with.

jaxtyping makes two functions of each: one with its parameters and Any for a result, called before it, and one with its
parameters and its result, called after it. The first is left alone: what a function refuses, it says itself. What it
accepts has to be what its annotations say; where none says what it returns, nothing is checked.
"""

import types
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# Where annotations are of arrays. A configuration says itself what it does not take.
CHECKED = (
    *(f"twomamba_jax.{name}" for name in ("ops", "layers", "generation", "sampling", "shapes")),
    "train.cross_entropy",
)

_jaxtyped, _check = jaxtyping.jaxtyped, beartype(conf=BeartypeConf(is_pep484_tower=True))  # an integer is a float


def install() -> None:
    """Has what is imported from now on checked."""
    jaxtyping.jaxtyped = _jaxtyped_where_annotated
    jaxtyping.install_import_hook(CHECKED, f"{__name__}.{check.__name__}")


def _jaxtyped_where_annotated(*, typechecker: Any) -> Callable:
    """jaxtyping's, but for functions without annotations: it makes two more of each, at every call of one around it."""

    def decorate(function: Callable | type) -> Callable | type:
        bare = isinstance(function, types.FunctionType) and not function.__annotations__
        return function if bare else _jaxtyped(function, typechecker=typechecker)

    return decorate


def check(function: Callable) -> Callable:
    """`function` with beartype's checks, if it is the one called after."""
    return function if function.__annotations__.get("return") is Any else _check(function)
