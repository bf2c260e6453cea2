"""`benchmarks/data.py` with a little text: the text that it writes, and its table."""

import importlib
import json

import pytest


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("data")


def test_the_text_is_as_long_as_asked(script, tmp_path):
    script.write_text(tmp_path / "a.jsonl", 0.3)
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    sizes = [len(text.encode()) for text in texts]
    assert sum(sizes) - sizes[-1] < 300_000 <= sum(sizes)


def test_prints_a_row_for_each_packing(script, capsys):
    assert script.main(["--megabytes", "0.3", "--tokenizer", "bytes", "--batches", "2"]) == 0
    packed, documents = (line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[-2:])
    assert [cell.strip() for cell in packed[:2]] == ["bytes", "packed"]
    assert [cell.strip() for cell in documents[:2]] == ["bytes", "documents"]
    assert int(packed[3].replace(",", "")) > 300_000  # bytes and an end of each document
    assert float(packed[-1]) > 0
    assert documents[4].strip() == ""
