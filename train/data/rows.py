"""From documents to batches: rows, packed or of one document, and iterators whose position can be saved.

A row is a dict of arrays [T]: `tokens`, `targets` (the next token) and `segment_ids` int32, and `weights` float32, 0
where a target belongs to another document than its token, or to padding. A batch has the same keys, [B, T].
"""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from train.data.tokenized import Split

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows by index: `rows[index]` depends on `index` alone, so any row can be made at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


def make_row(tokens: np.ndarray, segment_ids: np.ndarray, length: int, padding: int) -> Batch:
    """A row of `length` targets from at most `length` + 1 tokens and their segments, from 1; padding is segment 0."""
    missing = (0, length + 1 - tokens.size)
    tokens = np.pad(tokens.astype(np.int32), missing, constant_values=padding)
    segment_ids = np.pad(segment_ids.astype(np.int32), missing)
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "segment_ids": segment_ids[:-1],
        "weights": (segment_ids[1:] == segment_ids[:-1]).astype(np.float32) * (segment_ids[1:] > 0),
    }


class PackedRows:
    """Documents laid end to end and cut into rows of `length` targets.

    Neighbouring rows share one token (the last target of one is the first token of the next), so every token but the
    first of a document is a target once. A document is a segment, numbered in its row; where a cut goes through it, its
    second part sees nothing of the first.
    """

    def __init__(self, documents: Split, length: int, padding: int):
        """`documents` are one at least; `padding` is the token that fills the last row up."""
        self.documents, self._length, self._padding = documents, length, padding

    def __len__(self) -> int:
        return -(-(self.documents.tokens.size - 1) // self._length)

    def __getitem__(self, index: int) -> Batch:
        start = index * self._length
        tokens = self.documents.tokens[start : start + self._length + 1]
        starts = self.documents.starts
        first = np.searchsorted(starts, start, "right") - 1
        last = np.searchsorted(starts, start + tokens.size, "left")
        segment_ids = np.searchsorted(starts[first:last], np.arange(start, start + tokens.size), "right")
        return make_row(tokens, segment_ids, self._length, self._padding)


class DocumentRows:
    """One document a row, cut at `length` targets or padded to them, as the paper trained."""

    def __init__(self, documents: Split, length: int, padding: int):
        """`documents` are one at least; `padding` is the token that fills rows up."""
        self.documents, self._length, self._padding = documents, length, padding

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Batch:
        start, end = self.documents.starts[index : index + 2].tolist()
        tokens = self.documents.tokens[start : min(end, start + self._length + 1)]
        return make_row(tokens, np.ones(tokens.size), self._length, self._padding)


PACKINGS = {"packed": PackedRows, "documents": DocumentRows}


def training_batches(
    rows: Rows | grain.IterDataset, batch_size: int, seed: int, part: int = 0, num_parts: int = 1
) -> grain.DatasetIterator[Batch]:
    """Batches of `rows` without end, shuffled anew in every pass; `get_state()` is its position as JSON values.

    Of each batch, part p of P has rows p, p + P, and so on: the P parts (of processes, see `rows_of_process`) together
    are the batch that one process would have alone, so a position is the same for all of them and for any number of
    them. Rows that are a stream come in the stream's own order. P divides `batch_size`.
    """
    if isinstance(rows, grain.IterDataset):
        dataset = rows.batch(batch_size).map(lambda batch: _own_rows(batch, part, num_parts))
        return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=8))
    # As good as endless: of an endless one Grain cannot count the batches of one row.
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(2**62 // len(rows))[part::num_parts]
    dataset = dataset.batch(batch_size // num_parts)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def held_out_batches(
    rows: Rows, batch_size: int, limit: int | None, part: int = 0, num_parts: int = 1
) -> Iterator[Batch]:
    """`limit` of the rows (None: all), spread evenly and in order; the last batch is filled up with weights of 0.

    Each batch is cut into parts as those of `training_batches` are.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    indices = [number * len(rows) // count for number in range(count)]
    for start in range(0, count, batch_size):
        batch = [rows[index] for index in indices[start : start + batch_size]]
        filling = batch_size - len(batch)
        batch += [{**batch[-1], "weights": np.zeros_like(batch[-1]["weights"])}] * filling
        yield _own_rows({key: np.stack([row[key] for row in batch]) for key in batch[0]}, part, num_parts)


def _own_rows(batch: Batch, part: int, num_parts: int) -> Batch:
    return {key: array[part::num_parts] for key, array in batch.items()}


def abstract_batch(batch_size: int, length: int) -> dict[str, Any]:
    """A batch's arrays as `jax.ShapeDtypeStruct`s."""
    kinds = {"tokens": np.int32, "targets": np.int32, "segment_ids": np.int32, "weights": np.float32}
    return {key: jax.ShapeDtypeStruct((batch_size, length), kind) for key, kind in kinds.items()}
