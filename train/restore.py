"""The model of a run, and its parameters on one device: for what reads a run and does not train it."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from train.checkpoint import Which, restore_params
from train.configuration import build_model
from train.errors import UserError, one_line
from twomamba_jax.layers import LanguageModel


def read_saved_config(workdir: Path) -> dict[str, Any]:
    """The configuration that a run left in `workdir`. Raises UserError where there is none that can be read."""
    try:
        return json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no run in {workdir}: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {workdir / 'config.json'}: {one_line(error)}") from error


def build_anywhere(config: ConfigDict, implementation: str | None = None) -> LanguageModel:
    """The model of a run's configuration, `for_any_call`. Raises `train.errors.UserError`."""
    return for_any_call(build_model(config), implementation)


def for_any_call(model: LanguageModel, implementation: str | None = None) -> LanguageModel:
    """The model as it can be computed on any device, also in the calls of a generation.

    An `implementation` of None is the model's where that is XLA, and otherwise chosen call by call: the kernels that it
    was trained with may not run here, and do not have all calls of a generation.
    """
    if implementation is None and model.execution.implementation == "xla":
        implementation = "xla"
    return model.clone(execution=dataclasses.replace(model.execution, implementation=implementation))


def restore_on_one_device(
    workdir: Path, model: LanguageModel, which: Which, warn: Callable[[str], None]
) -> tuple[Any, int]:
    """The parameters of a run's best or latest checkpoint on the first device, and its step, as `restore_params`."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), parameter_shapes(model))
    return restore_params(workdir, shapes, which, warn)


@functools.cache
def parameter_shapes(model: LanguageModel) -> dict[str, Any]:
    """The tree of a model's parameters as ShapeDtypeStructs, which is kept and not to be changed."""
    return jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"])
