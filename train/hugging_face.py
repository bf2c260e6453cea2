"""Hugging Face datasets, read as a stream: from a directory on this disk, or from the Hub.

Nothing is copied on the way: the stream is tokenised once into the cache, or packed as it comes (`data.streaming`). A
directory is one that the package writes (`save_to_disk`), or one with Parquet, JSON lines or other files that it reads.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.documents import Input, digest_inputs, find_inputs, text_of
from train.errors import UserError, import_extra, one_line

COMMIT = re.compile(r"[0-9a-f]{40}")


def identify(data: ConfigDict) -> str:
    """What decides the documents of `data.dataset`: its content where it is a directory, its commit where it is not.

    A stream's directory is known by the names and sizes of its files alone, since a stream may be too long to read
    twice. Raises UserError where a dataset of the Hub comes without a commit: its branches move.
    """
    if Path(data.dataset).is_dir():
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


def load_stream(data: ConfigDict, split: str) -> Any:
    """The `datasets.IterableDataset` of one split. Raises UserError with the package's reason where there is none."""
    datasets = import_extra("datasets", "data")
    directory = Path(data.dataset)
    try:
        if (directory / "dataset_dict.json").is_file():
            return datasets.load_from_disk(data.dataset)[split].to_iterable_dataset()
        if (directory / "state.json").is_file():
            return datasets.load_from_disk(data.dataset).to_iterable_dataset()
        return datasets.load_dataset(data.dataset, data.subset, split=split, revision=data.revision, streaming=True)
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
