"""Rows made while a dataset is streamed: nothing is kept, and the position is exact all the same.

The stream is cut into windows of rows, and each window is shuffled by (seed, its number). A position is where its
window starts and how many of its rows are made: to restore one, the window is read again from its start. Where a window
starts is a place in the stream and how many tokens of the document there are in rows already: a position is small.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import grain
import numpy as np

from train.data.hugging_face import read_stream
from train.data.rows import Batch, make_row
from train.data.tokenizers import Tokenizer
from train.errors import UserError


class Source(NamedTuple):
    """A `datasets.IterableDataset` with the state where its training documents start, and how to read them."""

    stream: Any
    origin: dict[str, Any]
    name: str
    text_key: str
    tokenizer: Tokenizer


class StreamedRows(grain.IterDataset[Batch]):
    """Rows [length] of the documents of `source` without end, packed or one document a row, in windows of `window`.

    One iterator at a time: the place in the stream is the stream's own.
    """

    def __init__(self, source: Source, packing: str, length: int, window: int, seed: int):
        """Nothing is read yet."""
        super().__init__()
        self.source, self.packing, self.length, self.window, self.shuffle_seed = source, packing, length, window, seed

    def __iter__(self) -> "StreamedRowsIterator":
        return StreamedRowsIterator(self)


class StreamedRowsIterator(grain.DatasetIterator[Batch]):
    """See `StreamedRows`; its state is JSON values."""

    def __init__(self, dataset: StreamedRows):
        """At the first training document."""
        super().__init__()
        self._dataset = dataset
        # `state`: of the stream, at the document that the next row starts in; `used`: its tokens that are in rows.
        self._next = {"state": dataset.source.origin, "used": 0, "number": 0}
        self._start: dict[str, Any] = self._next
        self._rows: list[Batch] = []
        self._emitted = 0

    def __next__(self) -> Batch:
        if self._emitted == len(self._rows):
            self._fill()
        self._emitted += 1
        return self._rows[self._emitted - 1]

    def get_state(self) -> dict[str, Any]:
        """The start of the window, and how many of its rows are made."""
        return {"window": deepcopy(self._start), "emitted": self._emitted}

    def set_state(self, state: dict[str, Any]) -> None:
        """Reads the window again; the next row is the one after those that were made."""
        self._next = deepcopy(state["window"])
        self._rows, self._emitted = [], 0
        if state["emitted"]:
            self._fill()
            self._emitted = state["emitted"]

    def _fill(self) -> None:
        """The next window's rows, shuffled."""
        self._start = start = self._next
        documents = self._documents(start["state"])
        cut = self._packed if self._dataset.packing == "packed" else self._separate
        rows, state, used = cut(documents, start["used"])
        order = np.random.default_rng((self._dataset.shuffle_seed, start["number"])).permutation(len(rows))
        self._rows, self._emitted = [rows[index] for index in order], 0
        self._next = {"state": state, "used": used, "number": start["number"] + 1}

    def _documents(self, state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(the stream's state at it, tokens) of each document from `state` on, pass after pass."""
        source = self._dataset.source
        opening = [] if source.tokenizer.bos_id is None else [source.tokenizer.bos_id]
        while True:
            source.stream.load_state_dict(deepcopy(state))
            before, found = state, False
            for _, text in read_stream(source.stream, source.name, source.text_key):
                found = True
                tokens = [opening, source.tokenizer.encode(text), [source.tokenizer.eos_id]]
                yield before, np.concatenate(tokens).astype(np.int32)
                before = deepcopy(source.stream.state_dict())
            if not found and state == source.origin:
                raise UserError(f"{source.name} has no training document: its first ones are held out")
            state = source.origin

    def _packed(self, documents: Iterator[Any], used: int) -> tuple[list[Batch], dict[str, Any], int]:
        """Rows as PackedRows cuts them; the state at the document where the next row starts, and its tokens used."""
        length, count = self._dataset.length, self._dataset.window
        state, tokens = next(documents)
        rows = []
        for _ in range(count):
            pieces, missing = [], length + 1
            while True:
                pieces.append(tokens[used : used + missing])
                missing -= pieces[-1].size
                if missing == 0:
                    # The last target of a row is the first token of the next, so it counts as not used.
                    used += pieces[-1].size - 1
                    break
                (state, tokens), used = next(documents), 0
            segment_ids = np.repeat(np.arange(1, len(pieces) + 1), [piece.size for piece in pieces])
            rows.append(make_row(np.concatenate(pieces), segment_ids, length, self._dataset.source.tokenizer.eos_id))
        return rows, state, used

    def _separate(self, documents: Iterator[Any], used: int) -> tuple[list[Batch], dict[str, Any], int]:
        """Rows as DocumentRows makes them; the state at the next document."""
        length, rows = self._dataset.length, []
        for _ in range(self._dataset.window):
            _, tokens = next(documents)
            tokens = tokens[: length + 1]
            rows.append(make_row(tokens, np.ones(tokens.size), length, self._dataset.source.tokenizer.eos_id))
        state, _ = next(documents)
        return rows, state, 0
