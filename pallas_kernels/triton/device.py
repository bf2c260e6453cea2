"""The GPUs that the Triton kernels are compiled for, and what each allows."""

import contextlib
import contextvars
import importlib.util
from collections.abc import Iterator

import jax

from pallas_kernels.device import compute_capability, device_kind, several_kinds
from pallas_kernels.triton.interpreter import interpreting

OLDEST = 80  # compute capability of the first with tensor cores for bfloat16 and asynchronous copies

# Whose tiles a GPU takes. 89 and 120 have the 99 KiB of shared memory of 86; what is not here has those of 80.
LIKE = {86: 86, 88: 86, 89: 86, 90: 90, 100: 100, 101: 100, 103: 100, 110: 100, 120: 86, 121: 86}

ARCHITECTURES = 80, 86, 89, 90, 100, 120  # that `benchmarks/compile_triton.py` compiles for

UNLOWERED_JAX = (0, 12)  # from this version on jax-triton 0.4.1 cannot lower its calls

_compiled_for = contextvars.ContextVar("compiled_for", default=None)


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[None]:
    """Kernels traced inside are those of another compute capability, such as 80.

    What was traced before is kept by sizes alone: `jax.clear_caches()` between two capabilities in one process.
    """
    token = _compiled_for.set(capability)
    try:
        yield
    finally:
        _compiled_for.reset(token)


def capability() -> int:
    """The compute capability that kernels are compiled for: the default device's, as 90 for 9.0."""
    if (named := _compiled_for.get()) is not None:
        return named
    if interpreting():
        return OLDEST
    return _as_number(compute_capability())


def like(capability: int) -> int:
    """The capability among 80, 86, 90 and 100 whose tiles a GPU can run."""
    return LIKE.get(capability, OLDEST)


def served(capability: int) -> tuple[int, ...]:
    """Those of ARCHITECTURES that take the tiles of this capability."""
    return tuple(x for x in ARCHITECTURES if like(x) == capability)


def unsupported_device() -> str | None:
    """Why no Triton kernel runs on this machine, or None: it has a GPU and the packages, or kernels are interpreted."""
    if not interpreting():
        if jax.default_backend() != "gpu":
            return f"it needs an NVIDIA GPU, and the default backend is {jax.default_backend()!r}"
        found = compute_capability()
        if _as_number(found) < OLDEST:
            return f"it needs an NVIDIA GPU of compute capability 8.0 or later, and {device_kind()} has {found}"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be imported: pip install 'twomamba-jax[triton]'"
    if not interpreting() and jax.__version_info__ >= UNLOWERED_JAX:
        return f"jax-triton does not lower it under JAX {jax.__version__}: pip install 'twomamba-jax[triton]'"
    return several_kinds()


def _as_number(capability: str) -> int:
    """90 of "9.0", and 0 of what is no number: other vendors' GPUs."""
    digits = capability.replace(".", "")
    return int(digits) if digits.isdigit() else 0
