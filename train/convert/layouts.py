"""The layouts that an import takes, and which of them a checkpoint has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from train.convert import authors, mamba2, own
from train.convert.reading import PickleFiles, SafetensorsFiles
from train.convert.tensors import Tensor
from twomamba_jax.config import ModelConfig


def no_extras(files: SafetensorsFiles | PickleFiles, model: ModelConfig) -> Callable[[str], bool]:
    """A checkpoint has its parameters and nothing else."""
    return lambda key: False


@dataclass(frozen=True)
class Layout:
    """How a checkpoint directory says what its model is, and where its parameters are.

    Attributes:
      name: for corpus.json.
      read_model: (config.json, its path for messages) -> the variant and the model. Raises UserError.
      tensors: every tensor by its key.
      length: the key of config.json that has the length of the rows it was trained on.
      find_extras: (files, model) -> whether a key is of a tensor that is there and no parameter. Raises UserError where
        such a tensor is not what it must be.
    """

    name: str
    read_model: Callable[[Mapping[str, Any], str], tuple[str, ModelConfig]]
    tensors: Callable[[ModelConfig], dict[str, Tensor]]
    length: str = "max_position_embeddings"
    find_extras: Callable[[SafetensorsFiles | PickleFiles, ModelConfig], Callable[[str], bool]] = no_extras


OWN = Layout("own", own.read_model, own.tensors, "length")
AUTHORS = Layout("authors", authors.read_model, authors.tensors, find_extras=authors.find_extras)
HUGGING_FACE, STATE_SPACES = (
    Layout(kind.name, kind.read_model, kind.tensors, find_extras=kind.find_extras)
    for kind in (mamba2.HUGGING_FACE, mamba2.STATE_SPACES)
)


def find_layout(config: Mapping[str, Any]) -> Layout:
    """The layout that a config.json is of; the paper's authors' where it is none of the others."""
    if config.get("format") == own.FORMAT:
        return OWN
    if config.get("model_type") == "mamba2":
        return HUGGING_FACE
    return STATE_SPACES if "ssm_cfg" in config else AUTHORS
