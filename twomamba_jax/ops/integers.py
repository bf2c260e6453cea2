"""Counts and sizes that callers give, which decide the shapes of a program."""

import operator
from typing import SupportsIndex

Integer = SupportsIndex  # Python's and NumPy's integers, and arrays of one


def checked_integer(name: str, value, or_none: bool = False, least: int = 1) -> int | None:
    """`value`, an `Integer`, as Python's int; `or_none` allows None.

    Raises ValueError for anything else (a bool, a float, a value traced by JAX), and for integers below `least`.
    """
    if value is None and or_none:
        return None
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        shown = repr(value) if number is None else number
        raise ValueError(f"{name}={shown} must be an integer of at least {least}{', or None' if or_none else ''}")
    return number
