"""From documents to batches: packed rows, and an iterator whose position can be saved.

A row is a dict of arrays [T]: `tokens`, `targets` (the next token) and `segment_ids` int32, and `weights` float32, 0
where a target belongs to another document than its token, or to padding. A batch has the same keys, [B, T].
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from train.corpus import END_OF_DOCUMENT

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows by index: `rows[index]` depends on `index` alone, so any row can be made at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class PackedRows:
    """Documents laid end to end, each closed by END_OF_DOCUMENT, and cut into rows of `length` targets.

    Neighbouring rows share one token (the last target of one is the first token of the next), so every token but the
    first of a document is a target once. A document is a segment; the padding of the last row is segment 0.
    """

    def __init__(self, documents: Sequence[np.ndarray], length: int):
        """`documents` are uint8 [bytes], at least one of them with a byte."""
        sizes = [document.size + 1 for document in documents]
        self._tokens = np.full(sum(sizes), END_OF_DOCUMENT, np.uint16)
        for document, end in zip(documents, np.cumsum(sizes), strict=True):
            self._tokens[end - 1 - document.size : end - 1] = document
        self._segment_ids = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
        self._length = length

    def __len__(self) -> int:
        return -(-(self._tokens.size - 1) // self._length)

    def __getitem__(self, index: int) -> Batch:
        start = index * self._length
        piece = slice(start, start + self._length + 1)
        padding = (0, self._length + 1 - self._tokens[piece].size)
        tokens = np.pad(self._tokens[piece].astype(np.int32), padding, constant_values=END_OF_DOCUMENT)
        segment_ids = np.pad(self._segment_ids[piece], padding)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": segment_ids[:-1],
            "weights": (segment_ids[1:] == segment_ids[:-1]).astype(np.float32) * (segment_ids[1:] > 0),
        }


def training_batches(rows: Rows, batch_size: int, seed: int) -> grain.DatasetIterator[Batch]:
    """Batches of `rows` without end, shuffled anew in every pass; `get_state()` is its position as JSON values."""
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(batch_size)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def held_out_batches(rows: Rows, batch_size: int, limit: int | None) -> Iterator[Batch]:
    """`limit` of the rows (None: all), spread evenly and in order; the last batch is filled up with weights of 0."""
    count = len(rows) if limit is None else min(limit, len(rows))
    indices = [number * len(rows) // count for number in range(count)]
    for start in range(0, count, batch_size):
        batch = [rows[index] for index in indices[start : start + batch_size]]
        filling = batch_size - len(batch)
        batch += [{**batch[-1], "weights": np.zeros_like(batch[-1]["weights"])}] * filling
        yield {key: np.stack([row[key] for row in batch]) for key in batch[0]}
