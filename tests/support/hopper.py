"""What only a Hopper GPU can run: marked `gpu`, and skipped with the reason elsewhere."""

import os

import jax
import pytest

from pallas_kernels.device import unsupported_device

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers of pytest share the GPU

UNSUPPORTED = unsupported_device()
HOPPER = [pytest.mark.gpu, pytest.mark.skipif(UNSUPPORTED is not None, reason=f"no kernel: {UNSUPPORTED}")]

on_two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="one device: there is nothing to shard")


def on_hopper(test):
    """The test with these marks."""
    for mark in HOPPER:
        test = mark(test)
    return test
