"""The parameters of a model from the tensors of a checkpoint: all of them are there, fit, and nothing is left over."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.convert.reading import TAKEN, PickleFiles, SafetensorsFiles, described
from train.convert.tensors import Tensor
from train.errors import UserError


def check_tensors(
    files: SafetensorsFiles | PickleFiles, tensors: Mapping[str, Tensor], is_buffer: Callable[[str], bool]
) -> None:
    """Raises UserError, naming tensors, where some are missing, left over, of another shape or of another dtype."""
    missing = [key for key in tensors if key not in files.entries]
    if missing:
        raise UserError(
            f"the checkpoint lacks {', '.join(described(missing))}: expected {len(tensors)} tensors, by its "
            "config.json; fetch it again, or give the config.json that it was saved with"
        )
    left = [key for key in files.entries if key not in tensors and not is_buffer(key)]
    if left:
        raise UserError(
            f"the checkpoint has {', '.join(described(left))}, which the model of its config.json does not: "
            "it is of another model, or of another program; give the config.json that it was saved with"
        )
    for key, tensor in tensors.items():
        entry = files.entries[key]
        if entry.shape != tensor.shape:
            raise UserError(
                f"{key} has shape {list(entry.shape)}, expected {list(tensor.shape)} by config.json: give the "
                "config.json that it was saved with"
            )
        if entry.dtype not in TAKEN:
            raise UserError(
                f"{key} is {entry.dtype}, expected one of {', '.join(TAKEN.values())}: save the model in float32"
            )


def read_parameters(files: SafetensorsFiles | PickleFiles, tensors: Mapping[str, Tensor], shapes: Any) -> Any:
    """The tree of parameters like `shapes`, float32 arrays of the CPU, filled a tensor at a time."""
    tree = jax.tree.map(lambda leaf: _empty(leaf.shape), shapes)
    for key, tensor in tensors.items():
        for parameter, values in tensor.unpack(files.read(key)):
            parameter.of(tree)[...] = values
    return jax.tree.map(jnp.from_dlpack, tree)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array that JAX takes over without a copy: it starts at a multiple of 64 bytes."""
    count = math.prod(shape)
    memory = np.empty(count + 16, np.float32)
    start = -memory.ctypes.data % 64 // memory.itemsize
    return memory[start : start + count].reshape(shape)
