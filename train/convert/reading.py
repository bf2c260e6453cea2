"""The tensors of a checkpoint directory, read one at a time: safetensors, sharded or not, or PyTorch's pickles."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UserError, import_extra, one_line

# What becomes of the numbers: float32, in which all of them are exact. "F32" is how safetensors names a dtype.
TAKEN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Under which name a directory has its tensors, the first of them first; an index names the files of a sharded one.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, its dtype by safetensors' name, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """The tensors of one or several `.safetensors` files. Each is read when it is asked for."""

    def __init__(self, directory: Path):
        """Reads the headers. Raises UserError where a file is missing or damaged, or an index names what is not."""
        self._safetensors = import_extra("safetensors", "convert")
        self.entries: dict[str, Entry] = {}
        index = directory / INDEX
        shards = _shards(index) if index.exists() else None
        for name in [SINGLE] if shards is None else dict.fromkeys(shards.values()):
            self._list(directory / name)
        for key, name in (shards or {}).items():
            if key not in self.entries or self.entries[key].file.name != name:
                raise UserError(
                    f"{index} says that {key} is in {name}, and it is not there: the download is incomplete or mixed; "
                    "fetch the directory again"
                )

    def _list(self, path: Path) -> None:
        for key, entry in self._open(path, _entries):
            if key in self.entries:
                raise UserError(f"{key} is in {self.entries[key].file} and in {path}: remove one of the two files")
            self.entries[key] = entry

    def _open(self, path: Path, use: Any) -> Any:
        try:
            with self._safetensors.safe_open(path, framework="np") as file:
                return use(path, file)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: fetch the directory again") from error
        except (self._safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): fetch it again") from error

    def read(self, key: str) -> np.ndarray:
        """The values of a tensor, in their own dtype.

        The file is mapped for this alone: pages that were read once and stay mapped would count as the process's.
        """
        return self._open(self.entries[key].file, lambda _, file: file.get_tensor(key))


def _entries(path: Path, file: Any) -> list[tuple[str, Entry]]:
    names = file.keys()
    slices = ((key, file.get_slice(key)) for key in names)
    return [(key, Entry(path, one.get_dtype(), tuple(one.get_shape()))) for key, one in slices]


def _shards(index: Path) -> dict[str, str]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): Path(str(name)).name for key, name in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index with a weight_map ({one_line(error)}): fetch it again") from error


class PickleFiles:
    """The tensors of PyTorch's pickles, read by PyTorch with weights alone: no code of the file's runs."""

    def __init__(self, directory: Path):
        """Maps the files. Raises UserError where PyTorch is not installed or cannot read them."""
        single, index = (directory / name for name in PICKLES)
        paths = [directory / name for name in dict.fromkeys(_shards(index).values())] if index.exists() else [single]
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{paths[0]} is a pickle, which only PyTorch reads ({one_line(error)}): pip install torch, or save the "
                "model as safetensors"
            ) from error
        self._tensors: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL"}
        for path in paths:
            try:
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # A file of somebody else's: the package raises what its many readers raise.
                raise UserError(
                    f"{path} cannot be read as weights alone ({one_line(error)}): fetch it again"
                ) from error
            if not isinstance(tensors, Mapping):
                raise UserError(f"{path} holds a {type(tensors).__name__}, expected tensors by name: save a state_dict")
            self._tensors |= tensors
            for key, one in tensors.items():
                self.entries[key] = Entry(path, names.get(one.dtype, str(one.dtype)), tuple(one.shape))

    def read(self, key: str) -> np.ndarray:
        """The values of a tensor, as float32."""
        return self._tensors[key].float().numpy()


def open_tensors(directory: Path) -> SafetensorsFiles | PickleFiles:
    """The tensors of `directory`. Raises UserError where it has none, or they cannot be read."""
    if (directory / INDEX).exists() or (directory / SINGLE).exists():
        return SafetensorsFiles(directory)
    if any((directory / name).exists() for name in PICKLES):
        return PickleFiles(directory)
    raise UserError(
        f"{directory} has no tensors: expected {SINGLE}, {INDEX} or {PICKLES[0]}, as save_pretrained writes them"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the directory that save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({one_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: give the directory that save_pretrained wrote")
    return content


def described(keys: Any, most: int = 3) -> Iterator[str]:
    """The first names of a long list, and how many more there are, for a message."""
    keys = list(keys)
    yield from keys[:most]
    if len(keys) > most:
        yield f"{len(keys) - most} more"
