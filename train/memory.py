"""Devices that run out of memory: a mistake that the user can put right, as one line."""

import contextlib
import re
from collections.abc import Iterator

import jax

from train.errors import UserError, one_line

EXHAUSTED = "RESOURCE_EXHAUSTED"  # in JAX's message
SIZE = re.compile(r"allocat\w+ ([\d.]+ ?\w+)")


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Raises UserError, with `advice`, in the place of JAX's error where a device has too little memory inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        size = SIZE.search(str(error))
        said = f"{size[1]} more was asked for" if size else one_line(error, limit=120)
        raise UserError(
            f"the device has too little memory ({said}): {advice}; or end what else holds its memory"
        ) from error
