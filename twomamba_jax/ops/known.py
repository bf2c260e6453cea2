"""Values that a check can read: those that are there, on this machine."""

import jax
import numpy as np


def known(*values) -> bool:
    """Whether all values can be read here and now: none is traced, or has parts on other machines' devices."""
    return all(_is_known(value) for value in values)


def _is_known(value) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def place_of(wrong: np.ndarray) -> tuple[int, ...]:
    """The index of the first entry that is True."""
    return tuple(int(index[0]) for index in np.nonzero(wrong))
