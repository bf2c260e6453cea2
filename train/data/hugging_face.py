"""Hugging Face datasets, read as a stream: from a directory on this disk, or from the Hub.

Nothing is copied on the way: the stream is tokenised once into the cache, or packed as it comes (`data.streaming`). A
directory is one that the package writes (`save_to_disk`), or one with Parquet, JSON lines or other files that it reads.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.data.documents import Input, digest_inputs, find_inputs, text_of
from train.errors import UserError, import_extra, one_line

# Beside the data; those of two splits may be equal, and linked to one another to save room.
DESCRIPTIONS = frozenset(["dataset_dict.json", "dataset_info.json", "state.json", "README.md"])

COMMIT = re.compile(r"[0-9a-f]{40}")


def identify(data: ConfigDict) -> str:
    """What decides the documents of `data.dataset`: its content where it is a directory, its commit where it is not.

    A stream's directory is known by the names and sizes of its files alone, since a stream may be too long to read
    twice. Raises UserError where a dataset of the Hub comes without a commit: its branches move.
    """
    if os.path.isdir(_directory(data)):
        inputs = find_inputs("data.dataset", data.dataset)
        return _sizes(inputs) if data.streaming else digest_inputs(inputs)
    if not COMMIT.fullmatch(data.revision or ""):
        raise UserError(
            f"data.dataset={data.dataset!r} is no directory here; for a dataset of the Hub, data.revision must be the "
            f"commit, 40 hexadecimal digits, got {data.revision!r}"
        )
    return f"{data.dataset}@{data.revision}"


def _sizes(inputs: list[Input]) -> str:
    return ";".join(f"{entry.name}={entry.stamp[0]}" for entry in inputs)


def _directory(data: ConfigDict) -> Path:
    return Path(os.path.expanduser(data.dataset))


def check_splits(data: ConfigDict) -> None:
    """Raises UserError where what is held out would be trained on: one split, or one file, has both names."""
    directory = _directory(data)
    if _is_one_split(directory):
        _check_only_split(data, directory)
    elif data.held_out_split is not None:
        # The package takes sums of splits, and "all" for all of them.
        train, held_out = ({name.strip() for name in split.split("+")} for split in (data.split, data.held_out_split))
        if train & held_out or "all" in train | held_out:
            raise UserError(
                f"data.held_out_split={data.held_out_split!r} is in data.split={data.split!r}: it would be trained on; "
                "name another, or leave it out and data.held_out_percent is held out"
            )
    if os.path.isdir(directory):
        _check_twins(find_inputs("data.dataset", data.dataset))


def _is_one_split(directory: Path) -> bool:
    """Whether a `Dataset` was saved there: it has no splits, and reads as the same documents under any name of one."""
    return os.path.isfile(directory / "state.json") and not os.path.isfile(directory / "dataset_dict.json")


def _check_only_split(data: ConfigDict, directory: Path) -> None:
    try:
        own = json.loads((directory / "state.json").read_text(encoding="utf-8")).get("_split")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {directory / 'state.json'}: {one_line(error)}") from error
    if data.held_out_split is not None or data.split not in ("train", own):
        raise UserError(
            f"data.dataset={data.dataset!r} was saved without splits, so data.split={data.split!r} with "
            f"data.held_out_split={data.held_out_split!r} names nothing in it: leave both out and "
            "data.held_out_percent is held out, or save a DatasetDict"
        )


def _check_twins(inputs: list[Input]) -> None:
    first: dict[tuple[int, ...], Input] = {}
    for entry in inputs:
        # A blob of the Hub's cache, which has no suffix, is linked to under the name that it is read by.
        other = entry if entry.path.name in DESCRIPTIONS else first.setdefault(entry.file, entry)
        if other is not entry and other.path.suffix == entry.path.suffix:
            raise UserError(
                f"data.dataset: {other.path} and {entry.path} are one file, which could be trained on and held out: "
                "remove one of the two"
            )


def load_stream(data: ConfigDict, split: str) -> Any:
    """The `datasets.IterableDataset` of one split. Raises UserError with the package's reason where there is none."""
    datasets = import_extra("datasets", "data")
    # It logs what goes wrong in a file, and raises it as well: here it is one line.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    directory = _directory(data)
    try:
        if os.path.isfile(directory / "dataset_dict.json"):
            return datasets.load_from_disk(str(directory))[split].to_iterable_dataset()
        if _is_one_split(directory):
            return datasets.load_from_disk(str(directory)).to_iterable_dataset()
        # A relative "json" or "text" would be a reader of the package, and take files from the working directory.
        name = os.path.abspath(directory) if os.path.isdir(directory) else data.dataset
        return datasets.load_dataset(name, data.subset, split=split, revision=data.revision, streaming=True)
    except Exception as error:  # The package raises what its many readers raise.
        raise UserError(f"cannot load split {split!r} of data.dataset={data.dataset!r}: {one_line(error)}") from error


def read_stream(stream: Any, name: str, text_key: str) -> Iterator[tuple[int, str]]:
    """(number, text) of every document that is not empty, from where `stream` stands; numbers count from there.

    Raises UserError naming the document that cannot be read.
    """
    documents = iter(stream)
    for number in count():
        try:
            record = next(documents)
        except StopIteration:
            return
        except Exception as error:  # A network, a file, a parser: the stream does not say which kinds there are.
            raise UserError(f"{name}: {number} documents on, the stream broke ({one_line(error)})") from error
        text = text_of(record, text_key, f"{name}, {number} documents on")
        if text:
            yield number, text
