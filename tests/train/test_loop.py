"""Whole runs: what they leave behind, finishing twice, and a kill in the middle."""

import json
import math
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.exhaustive import exhaustive

import train
from train.checkpoint import checkpoint_steps
from train.main import main
from train.manifest import MANIFEST
from train.observe.metrics import read_metrics

ROOT = Path(train.__file__).parents[1]


@pytest.mark.quick
def test_what_a_run_leaves_behind(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "corpus.json", "metrics.jsonl", "checkpoints", "curve.png", "sample.txt", "lock",
    }  # fmt: skip
    assert checkpoint_steps(finished / "checkpoints") == [4, 8, 12]
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    trained = {"train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate", "train/skipped"}
    trained |= {"tokens_per_second", "seconds_per_step", "seconds_in_data", "mfu"}
    evaluated = {"eval/loss", "eval/accuracy", "eval/perplexity", "eval/bits_per_byte"}
    for record in records:
        assert record.keys() == {"step"} | trained | (evaluated if record["step"] % 4 == 0 else set())
    # The untrained model knows nothing of its 512 tokens.
    assert records[0]["train/loss"] == pytest.approx(math.log(512), abs=0.3)
    assert records[-1]["eval/loss"] < records[1]["eval/loss"] < math.log(512)
    assert records[-1]["eval/bits_per_byte"] == pytest.approx(records[-1]["eval/loss"] / math.log(2))
    assert json.loads((finished / "config.json").read_text())["model"]["d_model"] == 16
    assert len(json.loads((finished / "corpus.json").read_text())["digest"]) == 64
    assert (finished / "sample.txt").read_text().startswith("def ")
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_says_so_and_changes_nothing(finished, tiny, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert main(tiny(finished)) == 0
    output = capsys.readouterr().out
    assert "is finished" in output
    figures = read_metrics(finished / "metrics.jsonl")[-1]
    assert f"{figures['eval/bits_per_byte']:.4f} bits per byte" in output
    assert before == {path: path.read_bytes() for path in before}


def test_the_last_line_is_a_command_that_resumes(finished, tiny, capsys):
    main(tiny(finished))
    command = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "train.main"]
    assert main(words[3:]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.quick
def test_a_damaged_checkpoint_falls_back_and_ends_at_the_same_place(finished, tiny, tmp_path, capsys, same_end):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    largest = max(
        (workdir / "checkpoints/12").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    largest.write_bytes(largest.read_bytes()[:-100])
    assert main(tiny(workdir)) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "the checkpoint of step 12 is unreadable" in warning
    assert "falling back to step 8" in warning
    same_end(workdir, finished, 12)


def test_no_readable_checkpoint_is_an_error(finished, tiny, tmp_path, user_error):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    for step in (4, 8, 12):
        (workdir / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    line = user_error(tiny(workdir))
    assert "no readable checkpoint" in line
    assert all(f"step {step}: state/manifest.ocdbt is damaged" in line for step in (4, 8, 12))


def test_a_run_can_be_extended_where_the_schedule_allows(tiny, tmp_path, same_end, capsys):
    options = {"log_every": 1}
    assert main(tiny(tmp_path / "two", **options, steps=4)) == 0
    words, _, command = capsys.readouterr().out.splitlines()[-1].partition(": ")
    assert words == "with a larger --config.steps, to extend"
    assert main([*shlex.split(command)[3:], "--config.steps=8"]) == 0
    assert main(tiny(tmp_path / "one", **options, steps=8)) == 0
    same_end(tmp_path / "two", tmp_path / "one", 8)


@exhaustive("test_faults.py, where the batches are what is not finite")
def test_a_loss_that_is_not_finite_ends_the_run(tiny, tmp_path, user_error):
    options = {"optimizer.learning_rate": "1e30", "optimizer.clip_norm": "None", "skip_limit": 3}
    line = user_error(tiny(tmp_path, **options))
    assert re.search(r"steps (\d+) to (\d+) were skipped: .* loss nan, gradient norm nan, learning rate", line)
    assert "lower optimizer.learning_rate" in line


def test_kill_and_rerun_equals_an_uninterrupted_run_bit_for_bit(start, tiny, tmp_path, same_end, capsys):
    """The process is killed; what it is compared with, and what goes on after it, are runs of this one."""
    options = {"steps": 200, "checkpoint_every": 50, "eval_every": 100, "log_every": 5}
    killed = start(tiny(tmp_path / "killed", **options))
    deadline = time.monotonic() + 240
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "killed" / "checkpoints" / "50" / MANIFEST).exists():
            break
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert 50 <= read_metrics(metrics)[-1]["step"] < 200
    assert main(tiny(tmp_path / "whole", **options)) == 0
    capsys.readouterr()
    assert main(tiny(tmp_path / "killed", **options)) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert re.search(r"step \d+ of 200", output)
    assert "step 0 of 200" not in output
    same_end(tmp_path / "killed", tmp_path / "whole", 200)


@exhaustive("data/test_recall.py, and distributed/test_processes.py, whose runs are of this task")
def test_the_recall_task_runs_and_shows_prediction_and_truth(tiny, tmp_path, capsys):
    arguments = [
        *("--config", str(ROOT / "configs/2mamba_recall.py"), "--workdir", str(tmp_path)),
        *("--config.steps=4", "--config.optimizer.warmup_steps=1", "--config.model.d_model=16", "--config.length=24"),
        *("--config.data.repeat=8", "--config.data.gap=2,5", "--config.eval_rows=4", "--config.batch_size=4"),
        *("--config.model.num_layers=1", "--config.execution.remat=none", "--config.variant=softmax"),
    ]
    assert main(arguments) == 0
    sample = (tmp_path / "sample.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in sample[:3]] == ["prompt", "prediction", "truth"]
    truth = sample[2].split()[1:]
    assert len(truth) == 8
    assert sample[0].split()[2:10] == truth
    assert 0 <= read_metrics(tmp_path / "metrics.jsonl")[-1]["eval/accuracy"] <= 1
