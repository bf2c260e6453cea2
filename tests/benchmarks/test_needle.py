"""`benchmarks/needle.py`: its rows, its scores of what copies and of what is mistaken, and a run from its files."""

import json
import string
from pathlib import Path

import needle
import numpy as np
import pytest
from support.exhaustive import exhaustive

from train.data.tokenized import Split
from train.data.tokenizers import ByteTokenizer
from train.main import main as train

ROOT = Path(__file__).parents[2]
LENGTHS = "48", "96"  # a program each
DOCUMENTS = Split(
    np.concatenate([np.full(size, 48 + size % 7) for size in (300, 90, 200)]), np.array([0, 300, 390, 590]), 0
)


@pytest.fixture
def rows():
    return needle.make_rows(DOCUMENTS, ByteTokenizer(), 128, 6)


def copy(batch):
    """What stood behind the same 11 tokens (a line's beginning is so long) where they stood before."""
    answers = np.zeros(batch.targets.shape, np.int64)
    for row, (tokens, positions) in enumerate(zip(batch.tokens, batch.positions)):
        text = bytes(tokens.tolist())
        for column, position in enumerate(positions):
            before = text[position - 11 : position + 1]
            answers[row, column] = text[text.index(before) + len(before)]
    return answers


def test_a_row_has_its_line_in_one_document_and_asks_for_it_at_its_end(rows):
    assert rows.tokens.shape == (6, 128)
    depths, fillers = [], []
    for tokens, positions, targets in zip(rows.tokens, rows.positions, rows.targets):
        text, value = bytes(tokens.tolist()).decode(), bytes(targets.tolist()).decode()
        assert set(value) <= set(string.ascii_lowercase)
        line = text[text.index("\n") : text.index("=") + 2]
        assert text.count(line) == 2
        assert f"{line}{value}\n" in text
        assert text.endswith(line + value[:-1])
        assert positions.tolist() == list(range(120, 128))
        depths.append(text.index("\n"))
        fillers.append(set(text[: depths[-1]] + text[depths[-1] + len(line + value) + 1 : text.rindex(line)]))
    hay = 128 - 2 * len(line) - 2 * len(value)
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (1, hay)
    assert fillers == [{"6"}, {"4"}] * 3  # of the first and the last document: the second is too short


def test_scores_of_copying_and_of_mistakes(rows):
    assert needle.score(copy, rows, batch_size=4) == {"accuracy": 1.0, "exact": 1.0}

    def mistaken(batch):
        answers = copy(batch)
        answers[0, 0] += 1
        return answers

    assert needle.score(mistaken, rows, batch_size=4) == pytest.approx({"accuracy": 46 / 48, "exact": 4 / 6})


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    with pytest.raises(needle.UserError, match="no held-out document has more than 300 tokens"):
        needle.make_rows(DOCUMENTS, ByteTokenizer(), 300, 2)
    with pytest.raises(needle.UserError, match="30 tokens do not hold a line of 20 twice"):
        needle.make_rows(DOCUMENTS, ByteTokenizer(), 30, 2)
    assert needle.main([str(tmp_path), "--rows", "0"]) == 2
    assert needle.main([str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


@exhaustive("its rows and scores above, and tests/train/test_evaluate.py, which reads runs the same way")
def test_a_run_is_read_from_its_files(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 400)
    settings = {
        "data.source": "files", "data.paths": text, "data.cache_dir": tmp_path / "tokens", "length": 32, "steps": 1,
        "batch_size": 2, "eval_rows": 2, "model.d_model": 16, "model.num_layers": 1, "model.num_heads": 1,
        "model.head_dim": 8, "model.mlp_dim": 16, "optimizer.warmup_steps": 0, "sample.tokens": 1, "variant": "softmax",
    }  # fmt: skip
    workdir = tmp_path / "run"
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    assert train(["--config", str(ROOT / "configs" / "2mamba.py"), "--workdir", str(workdir), *overrides]) == 0
    capsys.readouterr()
    options = [str(workdir), "--lengths", *LENGTHS, "--rows", "3", "--batch_size", "2"]
    assert needle.main([*options, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["length"], one["trained_length"], one["step"]) for one in records] == [
        (int(length), 32, 1) for length in LENGTHS
    ]
    assert all(0 <= one["exact"] <= one["accuracy"] < 0.5 for one in records)  # after one step
    assert needle.main(options) == 0
    assert "| run | softmax | 32 | 96 |" in capsys.readouterr().out
