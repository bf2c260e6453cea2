"""Whether the layers of a training step run in a loop, and what XLA is told of the step.

In a loop, what the backward pass needs of each layer is written into stacks that are filled with zeros first and read
by slices: 25 of 108 GB that a step of `small` moves outside of matrix products (docs/measurements/training_step.md).
One after the other, layers have none of that, and take longer to compile. Parameters and checkpoints are the same.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from twomamba_jax.layers import LanguageModel

# Two projections of one input are otherwise one product, whose halves are copied out again to be kept.
UNROLLED = {"xla_gpu_dot_merger_threshold_mb": 0}
# Stacks that are written whole need not be filled with zeros first.
LOOPED = {"xla_gpu_enable_dus_accumulator_zero_init_elimination": True}
# Kernels wait for what they read, and not for all before them.
CONCURRENT = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def choose_layer_loop(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The model with `execution.scan_layers` decided: None is False on GPUs without fsdp, and True elsewhere.

    Under fsdp a loop puts together the parameters of one layer at a time.
    """
    if model.execution.scan_layers is not None:
        return model
    scan_layers = not on_gpus(mesh) or mesh.shape["fsdp"] > 1
    return model.clone(execution=dataclasses.replace(model.execution, scan_layers=scan_layers))


def compiler_options(model: LanguageModel, mesh: Mesh) -> dict[str, Any] | None:
    """The `compiler_options` of `jax.jit` for a training step of `model` on the devices of `mesh`."""
    if not on_gpus(mesh):
        return None
    options = UNROLLED if model.execution.scan_layers is False else LOOPED
    return options | CONCURRENT if model.execution.concurrent_kernels else options


def on_gpus(mesh: Mesh) -> bool:
    """Whether the mesh is of NVIDIA or AMD GPUs."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")
