"""Which GPUs the Triton kernels are for, and where they are chosen. Nothing here runs a kernel."""

import logging
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.triton import device
from twomamba_jax import decay_attention
from twomamba_jax.ops import dispatch


def set_devices(monkeypatch, *devices):
    """(kind, capability) of each device; None: a CPU."""
    found = [types.SimpleNamespace(device_kind=kind, compute_capability=capability) for kind, capability in devices]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if found else "cpu")
    monkeypatch.setattr(jax, "devices", lambda: found)
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "UNLOWERED_JAX", (99,))


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([], "it needs an NVIDIA GPU, and the default backend is 'cpu'"),
        ([("Tesla T4", "7.5")], "of compute capability 8.0 or later, and Tesla T4 has 7.5"),
        ([("AMD Instinct MI300X", "gfx942")], "of compute capability 8.0 or later, and AMD Instinct MI300X has gfx942"),
        ([("NVIDIA A100", "8.0"), ("NVIDIA L40S", "8.9")], "devices of one kind, and these are NVIDIA A100 and NVIDIA"),
        ([("NVIDIA A100", "8.0")] * 2, None),
        ([("NVIDIA GeForce RTX 5090", "12.0")], None),
    ],
)
def test_needs_an_nvidia_gpu(monkeypatch, devices, reason):
    set_devices(monkeypatch, *devices)
    found = device.unsupported_device()
    assert found is None if reason is None else reason in found


def test_needs_its_packages(monkeypatch):
    set_devices(monkeypatch, ("NVIDIA A100", "8.0"))
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None if name == "jax_triton" else object())
    assert device.unsupported_device() == "jax_triton cannot be imported: pip install 'twomamba-jax[triton]'"


def test_needs_a_jax_under_which_its_calls_are_lowered(monkeypatch):
    """Or it would be chosen by default and then fail."""
    set_devices(monkeypatch, ("NVIDIA A100", "8.0"))
    monkeypatch.setattr(device, "UNLOWERED_JAX", jax.__version_info__)
    assert f"jax-triton does not lower it under JAX {jax.__version__}: pip install" in device.unsupported_device()
    monkeypatch.setattr(device, "interpreting", lambda: True)
    assert device.unsupported_device() is None


@pytest.mark.parametrize(
    ("capability", "like"),
    [("8.0", 80), ("8.7", 80), ("8.6", 86), ("8.9", 86), ("9.0", 90), ("10.0", 100), ("12.0", 86)],
)
def test_a_gpu_takes_the_tiles_of_one_with_as_much_memory(monkeypatch, capability, like):
    set_devices(monkeypatch, ("a GPU", capability))
    assert device.like(device.capability()) == like
    with device.compiled_for(80):
        assert device.capability() == 80


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [([("NVIDIA H200", "9.0")], "mosaic_gpu"), ([("NVIDIA A100", "8.0")], "triton"), ([("T4", "7.5")], "triton")],
)
def test_each_gpu_has_its_kernels(monkeypatch, devices, chosen):
    set_devices(monkeypatch, *devices)
    assert dispatch.kernels_of_device() == chosen


def test_none_takes_xla_with_the_reason_and_a_name_is_refused(monkeypatch, caplog):
    set_devices(monkeypatch, ("T4", "7.5"))
    x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="twomamba_jax"):
        jax.eval_shape(lambda x: decay_attention(x, x, x), x)
    assert "implementation=xla (triton: it needs an NVIDIA GPU of compute capability 8.0 or later" in caplog.text
    with pytest.raises(ValueError, match="implementation='triton' cannot compute this call: it needs an NVIDIA GPU"):
        jax.eval_shape(lambda x: decay_attention(x, x, x, implementation="triton"), x)
