"""`benchmarks/cross_entropy.py` at a small shape: its table, and the memory that it is about."""

import importlib

import pytest
from support.exhaustive import exhaustive


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("cross_entropy")


@exhaustive("tests/train/test_cross_entropy.py, the loss itself")
def test_measures_four_ways_and_checks_them(script, capsys, monkeypatch):
    small = ["--length", "32", "--width", "8", "--vocab", "4000", "--chunk", "8", "--runs", "1"]
    assert script.main(small) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == ["plain", "recomputed", "cross_entropy", "cross_entropy, one chunk"]
    memory = [float(row[3]) for row in rows]
    logits = 64 * 4000 * 4 / 2**20
    assert memory[0] > logits > memory[1]
    assert memory[3] > logits > memory[2]

    monkeypatch.setattr(script, "chunked", lambda *operands, chunk_size: (1.01 * script.plain(*operands)[0], 0))
    assert script.main(small) == 1


def test_a_chunk_that_does_not_divide_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--chunk", "1000"])
    assert "--chunk 1000 must divide the 2048 tokens of the batch" in capsys.readouterr().err
