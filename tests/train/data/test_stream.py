"""Streamed rows: those of the same documents in memory, from any position exactly."""

import json
from itertools import islice

import datasets
import numpy as np
import pytest

from train.data.rows import PACKINGS, training_batches
from train.data.stream import Source, StreamedRows
from train.data.tokenized import tokenize_in_memory
from train.data.tokenizers import ByteTokenizer, load_tokenizer
from train.errors import UserError

TEXTS = [f"{number}:" + "x" * (number * 7 % 40) for number in range(40)] + [""]
LENGTH = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Three JSON lines files, whose documents come one file after the other."""
    root = tmp_path_factory.mktemp("stream")
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in TEXTS[part * 14 : (part + 1) * 14]]
        (root / f"train-{part}.jsonl").write_text("\n".join(lines))
    return root


def make(directory, packing="packed", window=1, seed=0, tokenizer=None, skipped=0, text_key="text"):
    stream = datasets.load_dataset(str(directory), split="train", streaming=True)
    documents = iter(stream)
    for _ in range(skipped):
        next(documents)
    source = Source(stream, stream.state_dict(), "data", text_key, tokenizer or ByteTokenizer())
    return StreamedRows(source, packing, LENGTH, window, seed)


def same(one, other):
    return all(np.array_equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in other)


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_rows_are_those_of_the_documents_in_memory(directory, packing, sentencepiece_model):
    tokenizer = load_tokenizer(str(sentencepiece_model))
    # Packed rows go on into the next pass, so two passes in memory are one longer array.
    split, _ = tokenize_in_memory([(False, text) for text in (TEXTS[5:] * 2) if text], tokenizer)
    expected = PACKINGS[packing](split, LENGTH, tokenizer.eos_id)
    rows = iter(make(directory, packing, tokenizer=tokenizer, skipped=5))
    for index in range(len(expected) - 1):
        assert same(next(rows), expected[index])


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_every_position_continues_exactly(directory, packing):
    rows = iter(make(directory, packing, window=7))
    positions, expected = [], []
    for _ in range(100):  # into the third pass over 40 documents
        positions.append(json.loads(json.dumps(rows.get_state())))
        expected.append(next(rows))
    for index in (0, 1, 6, 7, 8, 40, 67, 99):
        resumed = iter(make(directory, packing, window=7))
        resumed.set_state(positions[index])
        assert resumed.get_state() == positions[index]
        for one in expected[index : index + 20]:
            assert same(next(resumed), one)


def test_windows_are_shuffled_by_the_seed(directory):
    def thirty(window, seed):
        rows = iter(make(directory, window=window, seed=seed))
        return [next(rows)["tokens"].tolist() for _ in range(30)]

    plain, shuffled, again, other = thirty(1, 0), thirty(15, 0), thirty(15, 0), thirty(15, 1)
    assert shuffled == again != other
    assert shuffled[:15] != plain[:15]
    assert sorted(shuffled[:15]) == sorted(plain[:15])
    assert sorted(shuffled[15:]) == sorted(plain[15:])


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_the_batches_and_a_position(directory, processes):
    whole = training_batches(make(directory, window=4), batch_size=4, seed=0)
    parts = [training_batches(make(directory, window=4), 4, 0, process, processes) for process in range(processes)]
    for _ in range(5):
        batch = next(whole)
        for process, part in enumerate(parts):
            assert same(next(part), {key: array[process::processes] for key, array in batch.items()})
    position = whole.get_state()
    assert all(part.get_state() == position for part in parts)
    expected = next(whole)
    resumed = training_batches(make(directory, window=4), batch_size=4, seed=0)
    resumed.set_state(position)
    assert same(next(resumed), expected)
    for iterator in (whole, resumed, *parts):
        iterator.close()


def test_what_cannot_be_streamed_is_named(directory, tmp_path):
    with pytest.raises(UserError, match=r"data, 0 documents on has no key 'body'"):
        next(iter(make(directory, text_key="body")))
    with pytest.raises(UserError, match="data has no training document"):
        next(iter(make(directory, skipped=len(TEXTS))))
    (tmp_path / "train.jsonl").write_text('{"text": "fine"}\n' * 40)
    rows = iter(make(tmp_path))
    next(rows)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"data: 0 documents on, the stream broke \(.*train.jsonl"):
        list(islice(rows, 100))
