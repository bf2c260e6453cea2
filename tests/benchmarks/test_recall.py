"""`benchmarks/recall.py`: members that learn, alone or together; which rows are trained, chosen and shown."""

import dataclasses
import importlib
import json
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import exhaustive

TINY = ["--length", "8", "--pairs", "2", "--vocabulary", "12", "--d_models", "16", "--train_rows", "1024"]
TINY += ["--test_rows", "128", "--batch_size", "32", "--epochs", "12", "--stop_at", "0.9", "--commit", "c0ffee"]


class Embedding(nn.Module):
    """The least that has a language model's parameters and result."""

    @nn.compact
    def __call__(self, tokens, apply_head=True):
        init = nn.initializers.normal(0.1)
        head = self.param("head", init, (4, 12))
        x = self.param("embedding", init, (12, 4))[tokens]
        return x @ head if apply_head else x


@pytest.fixture
def recall(monkeypatch):
    """The script as a module."""
    return importlib.import_module("recall")


@pytest.fixture
def pretended(recall, monkeypatch):
    """Rows in the order in which they are asked for, and their accuracies by (variant, rate), to which 0.01 a seed."""
    asked, accuracies = [], {}

    def train_row(row, data, out, commit, say):
        asked.append((row.variant, row.d_model, row.members, row.stop_when))
        values = [accuracies[row.variant, rate] + 0.01 * seed for rate, seed in row.members]
        scores = {name: {"accuracy": values, "exact": [value / 2 for value in values]} for name in data}
        found = {
            "row": dataclasses.asdict(row), "accuracies": values, "scores": scores, "curve": [values],
            "reached": max(values) >= row.stop_at, "epochs": 3, "steps": 1170, "seconds": 7.0, "compile_seconds": 1.0,
            "parameters": 1234, "state_bytes": 5678, "digest": "d1", "commit": commit, "device": "abacus",
            "versions": {"jax": "9"},
        }  # fmt: skip
        sys.modules["kept_rows"].keep_row(out, row.name, found)
        return json.loads(json.dumps(found))

    monkeypatch.setattr(recall, "train_row", train_row)
    monkeypatch.setattr(recall, "load", lambda problem: sys.modules["recall_tasks"].make_rows(problem)[1])
    return asked, accuracies


@exhaustive("test_members_together_are_what_each_is_alone, and the rows that are chosen and shown")
def test_softmax_learns(recall, tmp_path, capsys):
    options = [*TINY, "--out", str(tmp_path), "--seeds", "1", "--learning_rates", "1e-2"]
    assert recall.main([*options, "--variants", "softmax"]) == 0
    (kept,) = sys.modules["kept_rows"].kept_rows(tmp_path)
    assert max(kept["accuracies"]) > 0.9
    assert kept["reached"]
    assert kept["steps"] == 32 * kept["epochs"]
    assert f"| softmax | 16 | 0.01 | 1 | {max(kept['accuracies']):.4f} |" in capsys.readouterr().out


@exhaustive("test_memoryless_sees_the_convolutions_window_alone")
def test_memoryless_does_not_learn(recall, tmp_path):
    """Values are 6 tokens; a query shows none of them, and no state has them."""
    options = [*TINY, "--out", str(tmp_path), "--seeds", "1", "--learning_rates", "1e-2", "--epochs", "3"]
    assert recall.main([*options, "--variants", "memoryless"]) == 0
    (kept,) = sys.modules["kept_rows"].kept_rows(tmp_path)
    assert kept["accuracies"][0] < 1 / 6 + 0.12


def test_members_together_are_what_each_is_alone(recall, tmp_path):
    (problem,) = recall.problems(recall.parse_arguments([*TINY, "--out", str(tmp_path)]))
    examples, members = recall.load(problem).train, sys.modules["recall_members"]
    chosen = [(1e-3, 0), (1e-2, 0), (1e-2, 1)]
    epoch = members.make_epoch(Embedding(), 256, 2, 1024)

    def two_epochs(of):
        state, losses = members.make_members(Embedding(), of), []
        for number in (1, 2):
            state, loss = epoch(state, jnp.array(number), examples)
            losses.append(loss)
        return state.params, jnp.stack(losses)

    together, losses = two_epochs(chosen)
    for place in range(3):
        alone, loss = two_epochs(chosen[place : place + 1])
        np.testing.assert_allclose(loss[:, 0], losses[:, place], rtol=1e-5)
        for name, value in alone.items():
            np.testing.assert_allclose(value[0], together[name][place], atol=1e-5)
    assert len(set(losses[1].tolist())) == 3


def test_scores_are_of_weighted_targets_and_whole_rows(recall):
    members = sys.modules["recall_members"]
    # Says that the token after t is t + member.
    model = SimpleNamespace(apply=lambda variables, tokens, apply_head: jax.nn.one_hot(tokens, 8))
    params = {"head": jnp.stack([jnp.roll(jnp.eye(8), shift, axis=1) for shift in (0, 1)])}
    rows = [
        {"tokens": [1, 2, 3, 4], "targets": [2, 3, 4, 5], "weights": [0, 1, 1, 1]},
        {"tokens": [1, 2, 3, 4], "targets": [2, 2, 4, 4], "weights": [1, 1, 0, 0]},
        {"tokens": [6, 5, 4, 3], "targets": [6, 0, 0, 0], "weights": [1, 0, 0, 0]},
    ]
    examples = members.make_examples([{key: np.array(value) for key, value in row.items()} for row in rows])
    assert examples.positions.tolist() == [[1, 2, 3], [0, 1, 0], [0, 0, 0]]
    accuracy, exact = members.make_test(model, 2)(params, examples)
    np.testing.assert_allclose(accuracy, [(0 + 1 / 2 + 1) / 3, (1 + 1 / 2 + 0) / 3], rtol=1e-6)
    np.testing.assert_allclose(exact, [1 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "num_tokens", "tests"),
    [
        (["--pairs", "2,4", "--length", "16", "--random_filler"], 8192, {"2 pairs": (16, 2), "4 pairs": (16, 4)}),
        (["--task", "copying", "--test_lengths", "3", "9"], 30, {"length 3": (8, 4), "length 9": (20, 10)}),
        (["--task", "parity"], 3, {"length 40-256": (256, 1)}),
        (["--task", "s5", "--train_lengths", "7", "--test_lengths", "8-9"], 121, {"length 8-9": (9, 9)}),
    ],
)
def test_tests_of_a_task_are_of_the_sizes_that_are_asked_for(recall, tmp_path, options, num_tokens, tests):
    sizes = ["--out", str(tmp_path), "--train_rows", "4", "--test_rows", "64", "--batch_size", "2"]
    (problem,) = recall.problems(recall.parse_arguments([*options, *sizes]))
    data = recall.load(problem)
    assert data.num_tokens == num_tokens
    assert {name: (found.tokens.shape[1], found.targets.shape[1]) for name, found in data.tests.items()} == tests
    assert all(len(found.tokens) == 64 // len(tests) for found in data.tests.values())
    assert len(data.train.tokens) == 4


def test_killed_grid_goes_on_and_reads_seeds_at_the_best_rate(recall, pretended, tmp_path, capsys, monkeypatch):
    asked, accuracies = pretended
    accuracies |= {("softmax", 1e-3): 0.995, ("softmax", 1e-2): 0.2, ("mamba2", 1e-3): 0.4, ("mamba2", 1e-2): 0.6}
    command = ["--out", str(tmp_path), "--variants", "softmax", "mamba2", "--d_models", "32", "--commit", "c0ffee"]
    command += ["--pairs", "4,8,16,32,64", "--learning_rates", "1e-3", "1e-2"]

    def killed(*arguments, train=recall.train_row):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recall, "train_row", killed)
        with pytest.raises(KeyboardInterrupt):
            recall.main(command)
    assert recall.main(command) == 0
    rates = (1e-3, 0), (1e-2, 0)
    assert asked == [
        ("softmax", 32, rates, "best"),
        ("softmax", 32, ((1e-3, 1), (1e-3, 2)), "all"),
        ("mamba2", 32, rates, "best"),
        ("mamba2", 32, ((1e-2, 1), (1e-2, 2)), "all"),
    ]
    text = capsys.readouterr().out
    assert "**mqar, T 256, 4 + 8 + 16 + 32 + 64 pairs**" in text
    several = " | ".join(["0.6100 (0.3050)"] * 5)
    ending = "epochs | 3 | 1,170 | 7 | 1,234 | 5,678 |"
    assert f"| mamba2 | 32 | 0.01 | 3 | 0.6100 | 0.0100 | 0.3050 | {several} | {ending}" in text
    assert "| softmax | 32 | 0.001 | 3 | 1.0050 | 0.0100 | 0.5025 |" in text
    assert "| 99% | 3 |" in text
    assert "| Mamba-2 | 46.9 | 75.1 | 89.6 |" in text
    assert "batch 256, at most 16 epochs" in text
    assert "commit c0ffee on abacus, jax 9" in text
    assert (tmp_path / "recall.md").read_text() == text


def test_parity_is_scaled_and_a_failing_row_leaves_the_others(recall, pretended, tmp_path, capsys):
    _, accuracies = pretended
    accuracies |= {("2mamba", 1e-3): 0.75}
    command = ["--out", str(tmp_path), "--task", "parity", "--variants", "softmax", "2mamba", "--d_models", "8"]
    assert recall.main([*command, "--learning_rates", "1e-3", "--seeds", "1", "--commit", "c0ffee"]) == 1
    shown = capsys.readouterr()
    assert "parity, trained at length 3-40, tested at 40-256" in shown.out
    assert "| 2mamba | 8 | 0.001 | 1 | 0.5000 |  | 0.3750 | epochs |" in shown.out
    assert "Published" not in shown.out
    assert "failed: parity-3-40, 8, softmax: " in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "softmaxx"], "--variants: unknown variant 'softmaxx': did you mean 'softmax'?"),
        (["--epochs", "0"], "--epochs, --seeds, --batch_size, --d_models and --learning_rates must be positive"),
        (["--train_rows", "100"], "--batch_size=256 must be at most --train_rows=100"),
        (["--test_rows", "0"], "--test_rows=0 must be at least 1 and 1"),
        (["--pairs", "65"], "length=256 is too short for pairs=65"),
        (["--task", "copying", "--test_lengths", "9-3"], r"lengths=(9, 3) must be a range"),
    ],
)
def test_mistakes_are_one_line(recall, tmp_path, capsys, options, message):
    assert recall.main(["--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
