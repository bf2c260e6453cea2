"""Hugging Face datasets: every kind of directory, and what identifies one."""

import logging

import datasets
import pytest
from ml_collections import ConfigDict

from train.data.hugging_face import identify, load_stream, read_stream
from train.errors import UserError

TEXTS = [f"text {number}" for number in range(12)]


@pytest.fixture
def directory(tmp_path):
    """A function that makes a directory of one kind with TEXTS as its split "train"."""
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"n": list(range(12)), "text": TEXTS})

    def make(kind):
        path = tmp_path / kind
        if kind == "saved dict":
            datasets.DatasetDict({"train": table}).save_to_disk(str(path))
        elif kind == "saved":
            table.save_to_disk(str(path))
        else:
            path.mkdir()
            table.to_parquet(str(path / "train.parquet"))
        return path

    return make


def data_of(path, **changes):
    values = {"dataset": str(path), "revision": None, "subset": None, "streaming": False}
    return ConfigDict(values | changes)


@pytest.mark.parametrize("kind", ["saved dict", "saved", "parquet"])
def test_every_kind_of_directory_is_read_in_order_and_goes_on_where_it_was(directory, kind):
    data = data_of(directory(kind))
    stream = load_stream(data, "train")
    reader = read_stream(stream, "name", "text")
    assert [next(reader) for _ in range(5)] == list(enumerate(TEXTS[:5]))
    again = load_stream(data, "train")
    again.load_state_dict(stream.state_dict())
    assert [text for _, text in read_stream(again, "name", "text")] == TEXTS[5:]


def test_a_directory_is_known_by_its_content_a_stream_by_its_sizes(directory):
    path = directory("parquet")
    extra = path / "extra.txt"
    extra.write_text("one")
    content, sizes = identify(data_of(path)), identify(data_of(path, streaming=True))
    extra.write_text("two")
    assert identify(data_of(path)) != content
    assert identify(data_of(path, streaming=True)) == sizes
    extra.write_text("three")
    assert identify(data_of(path, streaming=True)) != sizes


def test_a_line_that_is_no_json_is_said_once(tmp_path):
    """The package logs it as well, which would be a second line."""
    (tmp_path / "train.jsonl").write_text('{"text": "half of a pair \\ud83d"}\n')
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger("datasets").addHandler(handler)
    try:
        with pytest.raises(UserError, match=r"name: 0 documents on, the stream broke \(") as error:
            list(read_stream(load_stream(data_of(tmp_path), "train"), "name", "text"))
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert "\n" not in str(error.value)
    assert logged == []


def test_a_dataset_of_the_hub_is_known_by_its_commit():
    commit = "0123456789abcdef" * 2 + "01234567"
    assert identify(data_of("a/b", revision=commit)) == f"a/b@{commit}"
    for revision in (None, "main", commit[:-1]):
        with pytest.raises(UserError, match=r"data\.revision must be the commit, 40 hexadecimal digits"):
            identify(data_of("a/b", revision=revision))
