"""Writes safetensors a tensor at a time: the package takes all of a file's tensors at once.

A file is the length of a JSON header in 8 bytes, little-endian; the header, which names each tensor's dtype, shape and
place; and the tensors' bytes, one after the other.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.convert.reading import INDEX, SINGLE

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "BOOL": 1}
SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its dtype by safetensors' name, its shape, and what makes it when its turn comes."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return SIZES[self.dtype] * math.prod(self.shape)


def write_tensors(directory: Path, outputs: Mapping[str, Output], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or shards of about `shard_bytes` with their index, into `directory`."""
    shards: list[dict[str, Output]] = [{}]
    size = 0
    for key, output in outputs.items():
        if shards[-1] and size + output.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = output
        size += output.num_bytes
    if len(shards) == 1:
        _write_file(directory / SINGLE, outputs)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        where |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(one.num_bytes for one in outputs.values())}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, outputs: Mapping[str, Output]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it Hugging Face's loader refuses a file
    start = 0
    for key, output in outputs.items():
        end = start + output.num_bytes
        header[key] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs.values():
            file.write(np.ascontiguousarray(output.make()).data.cast("B") if output.num_bytes else b"")
