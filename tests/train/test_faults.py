"""Faults injected into whole runs: each ends as it should, and what was saved is whole."""

import errno
import gc
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE, exhaustive

from train import loop
from train.checkpoint import checkpoint_steps
from train.data.rows import training_batches
from train.main import main
from train.manifest import MANIFEST
from train.observe.metrics import MetricsWriter, read_metrics
from train.observe.progress import ProgressDisplay
from train.workdir import writing

# A failed save of Orbax closes its event loop, and writes of TensorStore that fail a little later find it closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIGNALS, STEPS = (10, 200) if EXHAUSTIVE else (2, 80)
RUN = {"steps": STEPS, "log_every": 10, "eval_every": 40, "checkpoint_every": 20}


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(tiny(workdir, **RUN)) == 0
    return workdir


@pytest.fixture
def stray_signals():
    """Takes signals that come when the run no longer does: without it they would end the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_at_random_moments_end_at_the_uninterrupted_run(
    tiny, tmp_path, monkeypatch, capsys, uninterrupted, stray_signals, same_end
):
    """Time and again: a signal comes at a random moment after a random step, and the command is given again."""
    randomness = random.Random(0)
    moments = sorted(randomness.sample(range(1, STEPS * 3 // 4), SIGNALS))
    timers = []  # of the run that goes on: at most one, since a second SIGINT is not waited for

    def advance(self, step):
        if moments and step >= moments[0] and not timers:
            number = signal.SIGTERM if len(moments) % 2 else signal.SIGINT
            timers.append(threading.Timer(randomness.uniform(0, 3e-3), os.kill, (os.getpid(), number)))
            timers[0].start()
            moments.pop(0)
        elif timers and step % 5 == 0:  # a busy machine is not to let the run end before the signal
            timers[0].join()

    monkeypatch.setattr(ProgressDisplay, "advance", advance)
    stopped = []
    while not stopped or stopped[-1] < STEPS:
        assert main(tiny(tmp_path, **RUN)) == 0
        for timer in timers:
            timer.join()
        timers.clear()
        step = checkpoint_steps(tmp_path / "checkpoints")[-1]
        assert (tmp_path / "checkpoints" / str(step) / MANIFEST).exists()
        output = capsys.readouterr().out.splitlines()
        assert ("to resume: python -m train.main --config" in output[-1]) == (step < STEPS)
        assert (output[-2] == f"stopped by a signal, saved at step {step}") == (step < STEPS)
        stopped.append(step)
    assert stopped == sorted(set(stopped))
    assert len(stopped) == SIGNALS + 1
    same_end(tmp_path, uninterrupted, STEPS)


@exhaustive("the signals above, and test_processes.py, which sends SIGTERM to a process")
def test_sigterm_to_a_process(start, tiny, tmp_path):
    process = start(tiny(tmp_path, steps=100_000, checkpoint_every=100_000, eval_every=100_000, log_every=10))
    deadline = time.monotonic() + 240
    while not read_metrics(tmp_path / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    (step,) = checkpoint_steps(tmp_path / "checkpoints")
    assert f"stopped by a signal, saved at step {step}" in output
    assert "to resume: python -m train.main" in output.splitlines()[-1]


class Poisoned:
    """Training batches of which some, by number, have weights that are not a number."""

    def __init__(self, batches, bad):
        self._batches, self._bad, self._number = batches, bad, 0
        self.get_state, self.set_state, self.close = batches.get_state, batches.set_state, batches.close

    def __next__(self):
        self._number += 1
        batch = next(self._batches)
        return {**batch, "weights": batch["weights"] * np.float32("nan")} if self._number in self._bad else batch


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the batches with these numbers bad."""

    def make(bad):
        monkeypatch.setattr(loop, "training_batches", lambda *arguments: Poisoned(training_batches(*arguments), bad))

    return make


def test_a_nan_in_a_batch_is_skipped_counted_and_shown(tiny, tmp_path, poison, capsys):
    poison({3, 4})
    assert main(tiny(tmp_path, skip_limit=3)) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["train/skipped"] for record in records] == [0, 2, 2, 2, 2, 2]
    assert records[1]["train/loss"] is None
    assert all(record["train/loss"] > 0 for record in records if record["step"] != 4)
    assert "step 4/12  step skipped  2 skipped" in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run_with_what_is_known(tiny, tmp_path, poison, user_error):
    poison({2, 3, 6, 7, 8})
    line = user_error(tiny(tmp_path, skip_limit=3))
    assert "steps 6 to 8 were skipped" in line
    assert "at step 8 loss nan, gradient norm nan, learning rate 0.00296939" in line
    assert "0 parameters are not finite, 5 steps were skipped in all" in line
    assert intact(tmp_path) == [4, 8]


@pytest.fixture
def half(finished, tmp_path) -> Path:
    """A copy of the tiny run as it was at step 4 of 12."""
    workdir = Path(shutil.copytree(finished, tmp_path / "half"))
    for step in (8, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def intact(workdir: Path) -> list[int]:
    steps = checkpoint_steps(workdir / "checkpoints")
    assert all((workdir / "checkpoints" / str(step) / MANIFEST).exists() for step in steps)
    return steps


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_is_whole(half, finished, tiny, user_error, same_end):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        line = user_error(tiny(half))
        gc.collect()  # what is left of the failed writes ends here and not in another test
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot save the checkpoint of step 8 in {half.resolve() / 'checkpoints'} (" in line
    assert line.endswith("the last whole one is that of step 4; make room, and run again to resume")
    assert intact(half) == [4]
    assert main(tiny(half)) == 0
    same_end(half, finished, 12)


def test_a_full_disk_for_the_metrics_is_said(half, tiny, user_error, monkeypatch):
    def write(self, record):
        with writing(half):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsWriter, "write", write)
    assert user_error(tiny(half)) == f"error: cannot write to workdir {half}: No space left on device"
    assert intact(half) == [4]


def test_data_that_shrinks_under_the_run_ends_it_and_the_run_can_go_on(
    tiny, corpus_root, tmp_path, user_error, monkeypatch, capsys, same_end
):
    options = {"data.source": "files", "data.paths": corpus_root, "data.cache_dir": tmp_path / "tokens"}
    options |= {"steps": 24, "eval_every": 12, "checkpoint_every": 6}
    assert main(tiny(tmp_path / "whole", **options)) == 0
    write = MetricsWriter.write

    def shrink(self, record):
        write(self, record)
        if record["step"] == 8:
            (path,) = (tmp_path / "tokens").glob("*/train.tokens")
            with path.open("r+b") as file:
                file.truncate(40)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", shrink)
        line = user_error(tiny(tmp_path / "run", **options))
    assert "train.tokens has shrunk under the run" in line
    assert 6 <= intact(tmp_path / "run")[-1] < 24
    assert main(tiny(tmp_path / "run", **options)) == 0
    assert "is unreadable (train.tokens is damaged): made again" in capsys.readouterr().out
    same_end(tmp_path / "run", tmp_path / "whole", 24)
