"""The GPUs that the kernels are written for."""

import functools

import jax

from pallas_kernels.interpreter import interpreting

HOPPER = "9.0"


def unsupported_device() -> str | None:
    """Why no kernel runs on this machine, or None: it has a Hopper GPU, or kernels are interpreted."""
    if interpreting():
        return None
    if jax.default_backend() != "gpu":
        return f"it needs a Hopper GPU, and the default backend is {jax.default_backend()!r}"
    if not is_hopper():
        return f"it needs a Hopper GPU (compute capability {HOPPER}), and {device_kind()} has {compute_capability()}"
    return several_kinds()


def is_hopper() -> bool:
    """Whether the default device is one."""
    return compute_capability() == HOPPER


def compute_capability() -> str:
    """That of the default device, as "9.0"; what is no NVIDIA GPU has "none"."""
    return getattr(jax.devices()[0], "compute_capability", "none")


def several_kinds() -> str | None:
    """Says so where devices differ: a program has kernels for one of them only."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return f"it needs devices of one kind, and these are {' and '.join(kinds)}" if len(kinds) > 1 else None


def device_kind() -> str:
    """What JAX calls the default device."""
    return jax.devices()[0].device_kind


def multiprocessors() -> int:
    """Those of the default device, or of an H100 or H200 where it has none: it only compiles or interprets kernels."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def in_32_bits(function):
    """The function with JAX's 64-bit types off: the kernels count in 32 bits."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return wrapped
