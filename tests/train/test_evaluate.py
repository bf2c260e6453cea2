"""`python -m train.evaluate`: the figures of the training's own evaluation, and those by context."""

import json

import numpy as np
import pytest

from train.evaluate import main
from train.evaluation import ContextLosses
from train.observe.metrics import read_metrics


def figures_of(capsys, workdir, *options):
    capsys.readouterr()
    assert main(["--workdir", str(workdir), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_are_those_of_the_training(finished, capsys):
    """Of the same rows, in every figure; the losses by context add up to the loss."""
    figures = figures_of(capsys, finished, "--rows", "6", "--checkpoint", "latest")
    record = next(one for one in read_metrics(finished / "metrics.jsonl") if one["step"] == figures["step"])
    keys = [key for key in record if key.startswith("eval/")]
    assert len(keys) == 4
    np.testing.assert_allclose([figures[key] for key in keys], [record[key] for key in keys], rtol=1e-5)
    contexts = figures["by_context"]
    targets = sum(one["targets"] for one in contexts)
    assert sum(one["loss"] * one["targets"] for one in contexts) / targets == pytest.approx(figures["eval/loss"])
    assert [one["to"] for one in contexts] == [1, 2, 4, 8, 16, 32]


def test_other_data_and_the_training_split_are_evaluated(finished, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x\n" * 20)
    options = [
        "--config.data.source=files",
        f"--config.data.paths={path}",
        f"--config.data.cache_dir={tmp_path}/tokens",
    ]
    other = figures_of(capsys, finished, *options, "--split", "train")
    assert other["split"] == "train"
    assert other["rows"] > 1
    assert main(["--workdir", str(finished), *options, "--rows", "2"]) == 0
    assert "2 rows of the held_out split" in capsys.readouterr().out


def test_losses_by_context_restart_with_a_document():
    losses = ContextLosses()
    batch = {
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
        "weights": np.array([[1, 1, 0, 1, 1, 0]], np.float32),
    }
    losses.add(batch, np.array([[5.0, 4.0, 9.0, 3.0, 2.0, 9.0]]))
    assert losses.table() == [
        {"from": 1, "to": 1, "loss": 4.0, "targets": 2.0},
        {"from": 2, "to": 2, "loss": 3.0, "targets": 2.0},
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--rows", "0"], "--rows=0 must be at least 1; leave it out for all of the split"),
        (["--config.model.d_model=3"], "is not of the data: expected --config.data.KEY, length or batch_size"),
        (["--config.data.paths"], "--config.data.paths has no value: write --config.data.paths=VALUE"),
        (["--split", "middle"], "invalid choice: 'middle'"),
        ([], "there is no run in"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options, line, tmp_path, capsys):
    assert main(["--workdir", str(tmp_path), *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert line in error
