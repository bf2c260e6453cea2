"""Two real processes of one run, on one machine: they train as one does, stop together, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from support.exhaustive import exhaustive

import train
from train import processes
from train.errors import UserError
from train.main import main
from train.observe.metrics import read_metrics
from train.processes import join

ROOT = Path(train.__file__).parents[1]
PATIENCE = 240  # seconds, on a machine that others use as well

TINY = {
    "variant": "softmax",  # less to compile
    "model.d_model": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.vocab_size": 96,
    "execution.remat": "none",
    "batch_size": 4,
    "optimizer.decay_steps": 1_000_000,
    "optimizer.warmup_steps": 2,
    # With a small epsilon Adam's first updates are nearly signs, and rounding flips signs.
    "optimizer.eps": 1e-2,
    "steps": 1_000_000,
    "log_every": 5,
    "eval_every": 1_000_000,
    "checkpoint_every": 1_000_000,
}


def arguments(workdir: Path, **changes: object) -> list[str]:
    """Of the command line, with TINY."""
    values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return ["--config", str(ROOT / "configs/2mamba_recall.py"), "--workdir", str(workdir), *overrides]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts the command line with TINY in a process of its own."""
    started = []
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }

    def run(workdir: Path, variables: dict[str, object], **changes: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "train.main", *arguments(workdir, **changes)]
        variables = environment | {"JAX_NUM_CPU_DEVICES": 1} | variables
        variables = os.environ | {key: str(value) for key, value in variables.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, env=variables, text=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()  # where a test has failed; else it has ended
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_step(workdir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(record["step"] > step for record in read_metrics(workdir / "metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def parameters(workdir: Path, step: int) -> list[np.ndarray]:
    path = (workdir / "checkpoints" / str(step) / "state").resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return jax.tree.leaves(checkpointer.restore(path, restore_args=as_numpy)["params"])


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """The workdir of two processes that SLURM started, and the step at which they stopped: the second got SIGTERM."""
    workdir, port = tmp_path_factory.mktemp("pair") / "run", free_port()
    slurm = {"SLURM_JOB_ID": 1, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2}
    pair = [
        start(workdir, slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "JAX_COORDINATOR_PORT": port})
        for rank in (0, 1)
    ]
    wait_for_step(workdir, 0)
    pair[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=PATIENCE) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    (first, _), (second, _) = outputs
    assert "2 device(s) of 2 process(es), step 0 of" in first
    assert not re.search("step|resume", second)  # only the first prints
    return workdir, int(re.search(r"stopped by a signal, saved at step (\d+)\n", first)[1])


def test_two_processes_train_as_one_does_and_stop_at_the_same_step(stopped, tmp_path, capsys):
    workdir, step = stopped
    assert main(arguments(tmp_path, steps=step)) == 0
    assert "1 device(s)" in capsys.readouterr().out
    for ours, theirs in zip(parameters(workdir, step), parameters(tmp_path, step), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    records = [json.loads(path.read_text()) for path in (workdir / "config.json", tmp_path / "config.json")]
    assert records[0]["optimizer"] == records[1]["optimizer"]


@exhaustive("test_a_coordinator_that_is_not_there_is_one_clear_line, which is told in the same words")
def test_killing_one_ends_the_other_with_one_clear_line(stopped, start):
    workdir, step = stopped
    options = {"distributed__coordinator_address": f"127.0.0.1:{free_port()}", "distributed__num_processes": 2}
    pair = [start(workdir, {}, distributed__process_id=rank, **options) for rank in (0, 1)]
    wait_for_step(workdir, step)  # resumed by both, from the checkpoint of both
    pair[0].kill()
    killed = time.monotonic()
    _, errors = pair[1].communicate(timeout=PATIENCE)
    pair[0].communicate()
    assert time.monotonic() - killed < 60
    assert pair[1].returncode == 2, errors
    # JAX reports in its own words around it.
    (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert re.search("where another process ended first|this process lost the others", line), errors
    assert line.endswith("the same command again to resume")


def test_a_coordinator_that_is_not_there_is_one_clear_line(start, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    options = {"coordinator_address": address, "num_processes": 2, "process_id": 1, "timeout": 1}
    process = start(tmp_path / "run", {}, **{f"distributed__{key}": value for key, value in options.items()})
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: this process lost the others: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "distributed.coordinator_address, distributed.process_id missing: the three of"),
        ({"coordinator_address": "node1", "num_processes": 2, "process_id": 0}, "'node1' must be HOST:PORT"),
        ({"coordinator_address": "node1:80", "num_processes": 2, "process_id": 2}, "process_id=2 must be from 0 to 1"),
    ],
)
def test_incomplete_or_wrong_settings(options, message):
    given = dict.fromkeys(("coordinator_address", "num_processes", "process_id")) | options
    with pytest.raises(UserError, match=message):
        join(ConfigDict(given))


def test_an_interrupt_while_others_are_awaited_needs_no_python(monkeypatch):
    """JAX waits for them in C++, for minutes."""
    seen, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(processes, "end_on_abort", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: seen.append(signal.getsignal(signal.SIGINT)))
    join(ConfigDict({"coordinator_address": "node1:80", "num_processes": 2, "process_id": 0, "timeout": 1}))
    assert seen == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is before
