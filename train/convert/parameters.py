"""The parameters of a model from the tensors of a checkpoint: all of them are there, fit, and nothing is left over."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
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
            f"the checkpoint has {', '.join(described(left))}, which the model of its config.json does not: its "
            "attention_type is another, or it is of another program; give the config.json that it was saved with"
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
    """The tree of parameters like `shapes`, NumPy float32, filled a tensor at a time."""
    tree = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    for key, tensor in tensors.items():
        for parameter, values in tensor.unpack(files.read(key)):
            parameter.of(tree)[...] = values
    return tree
