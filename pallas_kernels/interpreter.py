"""Kernels on a machine without a GPU: `with interpreted(): ...` runs them through the Pallas interpreter.

It checks data flow, masks and barriers, and gives NaN for memory that nothing wrote. It is slow.

A kernel's threads wait for one another on threads of XLA's, of which there is one per core: with few cores they may
wait for ever, unless the environment variable NPROC, set before JAX is first used, asks for more (16 are enough here).
"""

import contextlib
import contextvars
from collections.abc import Iterator

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside are interpreted."""
    import jax.experimental.pallas.mosaic_gpu as plgpu  # slow to import, and not there on every platform

    token = _interpreting.set(True)
    try:
        with plgpu.force_gpu_interpret_mode():
            yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether kernels traced here are interpreted: they then take scratch memory that the GPU does not need."""
    return _interpreting.get()
