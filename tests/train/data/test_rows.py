"""Packing, weights, shuffling and the position of the input pipeline."""

import json

import numpy as np
import pytest

from train.data.rows import DocumentRows, PackedRows, held_out_batches, training_batches
from train.data.tokenized import Split

pytestmark = pytest.mark.quick

END = 256


def split(*documents) -> Split:
    """Documents of byte tokens, each closed by END."""
    closed = [np.append(np.asarray(document, np.int32), END) for document in documents]
    starts = np.cumsum([0, *(one.size for one in closed)])
    return Split(np.concatenate(closed), starts, sum(one.size - 1 for one in closed))


def packed(*documents, length: int) -> PackedRows:
    return PackedRows(split(*documents), length, END)


DOCUMENTS = [np.frombuffer(text, np.uint8) for text in (b"abcde", b"f", b"ghijklmnop")]


def test_rows_by_hand():
    rows = packed(*DOCUMENTS[:2], length=5)  # a b c d e END f END: two rows, the second padded
    assert len(rows) == 2
    a, b, c, d, e, f = b"abcdef"
    first, second = rows[0], rows[1]
    assert first["tokens"].tolist() == [a, b, c, d, e]
    assert first["targets"].tolist() == [b, c, d, e, END]
    assert first["segment_ids"].tolist() == [1] * 5
    assert first["weights"].tolist() == [1] * 5
    assert second["tokens"].tolist() == [END, f, END, END, END]
    assert second["targets"].tolist() == [f, END, END, END, END]
    assert second["segment_ids"].tolist() == [1, 2, 2, 0, 0]
    assert second["weights"].tolist() == [0, 1, 0, 0, 0]
    assert {key: value.dtype for key, value in second.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "segment_ids": np.int32,
        "weights": np.float32,
    }


@pytest.mark.parametrize("length", [1, 2, 3, 7, 17, 18, 19, 40])
def test_every_token_but_the_first_of_a_document_is_a_target_once(length):
    rows = packed(*DOCUMENTS, length=length)
    seen = [row["targets"][row["weights"] > 0].tolist() for row in (rows[index] for index in range(len(rows)))]
    expected = [token for document in DOCUMENTS for token in [*document[1:].tolist(), END]]
    assert [token for row in seen for token in row] == expected


@pytest.mark.parametrize("batch_size", [10, 1])
def test_each_pass_holds_every_row_once_in_an_order_of_its_own(batch_size):
    rows = packed(np.arange(256).repeat(4)[:1000], length=10)
    assert len(rows) == 100
    batches = training_batches(rows, batch_size, seed=3)
    passes = [np.concatenate([next(batches)["tokens"] for _ in range(100 // batch_size)]) for _ in range(2)]
    batches.close()
    expected = sorted(rows[index]["tokens"].tolist() for index in range(100))
    orders = [one.tolist() for one in passes]
    assert [sorted(order) for order in orders] == [expected, expected]
    assert orders[0] != orders[1]
    again = training_batches(rows, batch_size, seed=3)
    other = training_batches(rows, batch_size, seed=4)
    assert np.array_equal(next(again)["tokens"], passes[0][:batch_size])
    assert not np.array_equal(next(other)["tokens"], passes[0][:batch_size])
    again.close()
    other.close()


def test_position_survives_json_and_continues_exactly():
    rows = packed(np.arange(200), length=7)
    batches = training_batches(rows, batch_size=4, seed=0)
    for _ in range(11):  # into the second pass over 29 rows
        next(batches)
    position = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(9)]
    batches.close()
    resumed = training_batches(rows, batch_size=4, seed=0)
    resumed.set_state(position)
    for batch in expected:
        found = next(resumed)
        assert all(np.array_equal(batch[key], found[key]) for key in batch)
    resumed.close()


def test_held_out_rows_come_once_and_the_last_batch_is_filled_with_weight_zero():
    rows = packed(*DOCUMENTS, length=3)
    count = len(rows)
    batches = list(held_out_batches(rows, batch_size=4, limit=None))
    assert [batch["tokens"].shape for batch in batches] == [(4, 3)] * -(-count // 4)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    weights = np.concatenate([batch["weights"] for batch in batches])
    for index in range(count):
        assert np.array_equal(tokens[index], rows[index]["tokens"])
        assert np.array_equal(weights[index], rows[index]["weights"])
    assert weights[count:].sum() == 0


def test_a_limit_spreads_over_the_whole_split():
    rows = packed(np.arange(100), length=1)  # row i starts with token i
    (batch,) = held_out_batches(rows, batch_size=4, limit=4)
    assert batch["tokens"][:, 0].tolist() == [0, 25, 50, 75]


def test_one_document_a_row_is_cut_or_padded():
    rows = DocumentRows(split(*DOCUMENTS), 6, END)
    assert len(rows) == 3
    short, _, long = (rows[index] for index in range(3))
    a, b, c, d, e = b"abcde"
    assert short["tokens"].tolist() == [a, b, c, d, e, END]
    assert short["targets"].tolist() == [b, c, d, e, END, END]
    assert short["segment_ids"].tolist() == [1] * 6
    assert short["weights"].tolist() == [1] * 5 + [0]
    assert long["tokens"].tolist() == list(b"ghijkl")
    assert long["targets"].tolist() == list(b"hijklm")
    assert long["weights"].tolist() == [1] * 6


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_every_batch_and_its_position(processes):
    rows = packed(np.arange(200), length=7)
    whole = training_batches(rows, batch_size=4, seed=0)
    parts = [training_batches(rows, 4, 0, process, processes) for process in range(processes)]
    for _ in range(11):  # into the second pass over 29 rows
        batch = next(whole)["tokens"]
        for process, part in enumerate(parts):
            assert np.array_equal(next(part)["tokens"], batch[process::processes])
    assert all(part.get_state() == whole.get_state() for part in parts)
    for iterator in (whole, *parts):
        iterator.close()
    held_out = list(held_out_batches(rows, 4, None))
    for process in range(processes):
        for batch, part in zip(held_out, held_out_batches(rows, 4, None, process, processes), strict=True):
            assert np.array_equal(part["weights"], batch["weights"][process::processes])
