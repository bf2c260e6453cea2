"""`benchmarks/ladder.py`: a row that is trained, and which rows are trained, chosen and shown."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
from support.exhaustive import exhaustive

from configs import base
from train.data.tokenized import Split

TINY = {"d_model": 8, "num_layers": 1, "num_heads": 1, "head_dim": 4, "mlp_dim": 8, "vocab_size": 257}


@pytest.fixture
def ladder(monkeypatch):
    """The script as a module."""
    return importlib.import_module("ladder")


@pytest.fixture
def pretended(ladder, monkeypatch):
    """Rows in the order in which they are asked for; their losses by (variant, rate), on both halves, and the seed."""
    asked, losses = [], {}

    def train_row(row, place):
        asked.append((row.variant, row.learning_rate, row.seed, *row.settings))
        chosen, reported = losses[row.variant, row.learning_rate]
        found = dataclasses.asdict(row) | {
            "losses": [chosen, reported + 0.01 * row.seed], "curve": [[8, 3.0], [16, reported]], "train_loss": 1.0,
            "gradient_norms": [[40, 9.0], [50, 0.25], [60, 1.5], [70, 0.5]],
            "parameters": 1234, "state_bytes": 5678, "tokens_per_second": 1e5, "memory_peak_bytes": 2**30,
            "workers": 0, "identity": {"digest": "d1"}, "commit": place.commit, "device": "abacus", "versions": {},
        }  # fmt: skip
        place.result(row).parent.mkdir(parents=True, exist_ok=True)
        place.result(row).write_text(json.dumps(found))

    monkeypatch.setattr(ladder, "train_row", train_row)
    return asked, losses


@exhaustive("the rows that are chosen and shown below, of which training is pretended")
def test_row_is_trained_and_leaves_its_figures_alone(ladder, monkeypatch, tmp_path):
    monkeypatch.setitem(base.SIZES, "nano", TINY)
    for number in range(60):
        (tmp_path / f"file{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n")
    row = ladder.Row("stdlib", "nano", "softmax", 1e-3, seed=3, steps=2, settings=("optimizer.clip_norm=1e-9",))
    place = ladder.Place(tmp_path / "out", root=tmp_path, commit="c0ffee")
    ladder.train_row(row, place)
    found = place.read(row)
    fields = {field.name: found[field.name] for field in dataclasses.fields(row)}
    assert ladder.Row(**fields | {"settings": tuple(found["settings"])}) == row
    assert row.name.endswith("-0.001-3-optimizer.clip_norm=1e-9")
    ((step, norm),) = found["gradient_norms"]
    assert step == 2
    assert 0.1 < norm < 10  # before it is clipped
    assert found["losses"] == pytest.approx([np.log(257)] * 2, abs=0.3)
    assert found["losses"][0] != found["losses"][1]
    assert [tokens for tokens, _ in found["curve"]] == [2 * 8 * 256]
    # Embedding and head, norms, MLP, four projections.
    assert found["parameters"] == 2 * 257 * 8 + 3 * 8 + 3 * 64 + 4 * 32
    assert (found["commit"], found["skipped"]) == ("c0ffee", 0)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [f"{row.name}.json"]


def test_small_is_larger_and_trained_as_lab_is(ladder):
    lab, small = (ladder.make_config(ladder.Row("stdlib", size, "2mamba", 1e-3, 0, 500)) for size in ("lab", "small"))
    assert (small.model.d_model, small.model.num_layers, small.model.vocab_size) == (1024, 20, 512)
    assert small.size == "small"
    assert (small.eval_every, small.checkpoint_every) == (100, 100)
    for key in ("model", "size", "eval_every", "checkpoint_every"):
        small[key] = lab[key]
    assert small == lab


def test_halves_hold_every_document_once(ladder):
    split = Split(np.arange(9), np.array([0, 2, 5, 9]), num_bytes=9)
    even, odd = sys.modules["ladder_row"].halves(split)
    assert even.tokens.tolist() == [0, 1, 5, 6, 7, 8]
    assert (even.starts.tolist(), odd.starts.tolist(), odd.tokens.tolist()) == ([0, 2, 6], [0, 3], [2, 3, 4])


def test_killed_ladder_goes_on_and_chooses_by_one_half(ladder, pretended, tmp_path, capsys, monkeypatch):
    asked, losses = pretended
    losses |= {("softmax", 1e-3): (2.0, 2.5), ("softmax", 2e-3): (2.1, 2.2)}
    losses |= {("2mamba", 1e-3): (2.4, 2.3), ("2mamba", 2e-3): (2.2, 2.6)}
    command = ["--out", str(tmp_path), "--workers", "0", "--variants", "softmax", "2mamba", "--seeds", "0", "1"]
    command += ["--learning_rates", "1e-3", "2e-3", "--commit", "c0ffee"]

    def killed(row, place, train=ladder.train_row):
        if len(asked) == 3:
            raise KeyboardInterrupt
        train(row, place)

    with monkeypatch.context() as patch:
        patch.setattr(ladder, "train_row", killed)
        with pytest.raises(KeyboardInterrupt):
            ladder.main(command)
    assert ladder.main(command) == 0
    first = [("softmax", 1e-3, 0), ("2mamba", 1e-3, 0), ("softmax", 2e-3, 0), ("2mamba", 2e-3, 0)]
    assert asked == [*first, ("softmax", 1e-3, 1), ("2mamba", 2e-3, 1)]
    assert ladder.main(command) == 0
    assert len(asked) == 6

    text = capsys.readouterr().out
    assert "| softmax | 0.001 | 2 | 2 | 2.5050 | 0.0071 | +0.0000 | 1,234 | 5,678 | 100,000 | 1.00 |" in text
    assert "| 2mamba | 0.002 | 2 | 2 | 2.6050 | 0.0071 | +0.1000 |" in text
    assert "| softmax | 0.002 | 0 | 2.1000 | 2.2000 | 1.0000 | 0.50 | 1.50 | c0ffee |" in text
    assert "SHA-256 d1. On abacus" in text
    names = {path.name for path in tmp_path.glob("*.*")}
    assert names == {f"stdlib-nano-400{end}" for end in (".md", "-tokens.png", "-losses.png", "-states.png")}


def test_plots_have_the_lowest_losses(ladder, pretended, tmp_path, monkeypatch):
    _, losses = pretended
    losses |= {("softmax", 1e-3): (2.0, 2.5), ("2mamba", 1e-3): (2.0, 2.25), ("linear", 1e-3): (2.0, 2.75)}
    report, drawn = sys.modules["ladder_report"], {}
    monkeypatch.setattr(report, "MOST_DRAWN", 2)
    for plot in ("draw_curves", "draw_losses", "draw_states"):
        monkeypatch.setattr(report, plot, lambda best, *_, plot=plot: drawn.update({plot: list(best)}))
    command = ["--out", str(tmp_path), "--workers", "0", "--learning_rates", "1e-3", "--variants"]
    assert ladder.main([*command, "softmax", "linear", "2mamba"]) == 0
    assert drawn == {plot: ["2mamba", "softmax"] for plot in ("draw_curves", "draw_losses", "draw_states")}
    assert "| linear |" in (tmp_path / "stdlib-nano-400.md").read_text()


def test_settings_make_rows_of_their_own(ladder, pretended, tmp_path, capsys):
    asked, losses = pretended
    losses |= {("softmax", 1e-3): (2.0, 2.5)}
    command = ["--out", str(tmp_path), "--workers", "0", "--variants", "softmax", "--learning_rates", "1e-3"]
    assert ladder.main(command) == 0
    losses |= {("softmax", 1e-3): (1.9, 2.4)}
    assert ladder.main([*command, "--seeds", "0", "1", "--set", "optimizer.b2=0.95"]) == 0
    assert asked == [
        ("softmax", 1e-3, 0), ("softmax", 1e-3, 0, "optimizer.b2=0.95"), ("softmax", 1e-3, 1, "optimizer.b2=0.95")
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert "| softmax | 0.001 | 1 | 1 | 2.5000 |" in text
    assert "| softmax (optimizer.b2=0.95) | 0.001 | 1 | 2 | 2.4050 |" in text


def test_settings_of_all_rows_are_said_once(ladder, pretended, tmp_path, capsys):
    _, losses = pretended
    losses |= {("softmax", 1e-3): (2.0, 2.5), ("2mamba", 1e-3): (2.0, 2.75)}
    command = ["--out", str(tmp_path), "--workers", "0", "--learning_rates", "1e-3", "--set", "optimizer.b2=0.95"]
    assert ladder.main([*command, "optimizer.b1=0.8", "--variants", "softmax"]) == 0
    assert "All rows with optimizer.b2=0.95, optimizer.b1=0.8. Corpus" in capsys.readouterr().out
    assert ladder.main([*command, "--variants", "softmax", "2mamba"]) == 0
    text = capsys.readouterr().out
    assert "| 2mamba | 0.001 | 1 | 1 | 2.7500 |  | +0.2500 |" in text
    assert "| softmax (optimizer.b1=0.8) | 0.001 | 1 | 1 | 2.5000 |" in text
    assert "All rows with optimizer.b2=0.95. Corpus" in text


def test_mixers_stand_beside_the_softmax_of_their_settings(ladder, pretended, tmp_path, capsys):
    _, losses = pretended
    command = ["--out", str(tmp_path), "--workers", "0", "--learning_rates", "1e-3", "--variants"]
    losses |= {("softmax", 1e-3): (2.0, 2.5), ("2mamba", 1e-3): (2.0, 2.75)}
    assert ladder.main([*command, "softmax", "2mamba"]) == 0
    losses |= {("softmax", 1e-3): (2.0, 2.0), ("2mamba", 1e-3): (2.0, 2.625)}
    assert ladder.main([*command, "softmax", "2mamba", "--set", "optimizer.b2=0.95"]) == 0
    assert ladder.main([*command, "2mamba", "--set", "optimizer.b1=0.8"]) == 0
    text = capsys.readouterr().out
    assert "| 2mamba | 0.001 | 1 | 1 | 2.7500 |  | +0.2500 |" in text
    assert "| 2mamba (optimizer.b2=0.95) | 0.001 | 1 | 1 | 2.6250 |  | +0.6250 |" in text
    assert "| 2mamba (optimizer.b1=0.8) | 0.001 | 1 | 1 | 2.6250 |  |  |" in text


def test_order_stands_beside_the_papers(ladder, pretended, tmp_path, capsys):
    _, losses = pretended
    # By the paper: 2.73, 2.73 and 3.03; 2mamba is of another size, softmax-conv2 has no figure, 2e-3 has fewer rows.
    at_one = {"softmax": 2.5, "2mamba-dt": 2.25, "linear": 2.375, "2mamba": 1.0, "softmax-conv2": 1.0}
    losses |= {(name, 1e-3): (2.0, loss) for name, loss in at_one.items()} | {("linear", 2e-3): (1.0, 1.0)}
    command = ["--out", str(tmp_path), "--workers", "0", "--set", "optimizer.b2=0.95", "--variants"]
    assert ladder.main([*command, *at_one, "--learning_rates", "1e-3"]) == 0
    assert ladder.main([*command, "linear", "--learning_rates", "2e-3"]) == 0
    text = capsys.readouterr().out
    lines = ["| 2mamba-dt | 2.73 | 2.2500 | 1.5 | 1 |", "| softmax | 2.73 | 2.5000 | 1.5 | 3 |"]
    lines += ["| linear | 3.03 | 2.3750 | 3 | 2 |", "", "Rank correlation of the two orders: 0.000."]
    assert text.count("\n".join(lines)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "softmaxx"], "--variants: unknown variant 'softmaxx': did you mean 'softmax'?"),
        (["--learning_rates", "0"], "--steps and --learning_rates must be positive"),
        (["--seeds", "-1"], "--workers and --seeds not negative"),
        (["--set", "optimizer.b3=1"], "unknown config key 'optimizer.b3'"),
        (["--set", "seed=1"], "--set seed: a row says this itself"),
    ],
)
def test_mistakes_are_one_line(ladder, tmp_path, capsys, options, message):
    assert ladder.main(["--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
