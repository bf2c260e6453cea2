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
    capability = jax.devices()[0].compute_capability
    if capability != HOPPER:
        return f"it needs a Hopper GPU (compute capability {HOPPER}), and {device_kind()} has {capability}"
    return None


def device_kind() -> str:
    """What JAX calls the default device."""
    return jax.devices()[0].device_kind


def in_32_bits(function):
    """The function with JAX's 64-bit types off: the kernels count in 32 bits."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return wrapped
