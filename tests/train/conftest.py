"""A tiny corpus and a tiny run, small enough that a test can afford to train."""

import subprocess
import sys
from pathlib import Path

import pytest

import train
from train.main import main

# Where `python -m train.main` works: the directory that holds the package under test.
ROOT = Path(train.__file__).parents[1]

TINY = {
    "model.d_model": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "length": 32,
    "batch_size": 4,
    "steps": 12,
    "optimizer.warmup_steps": 2,
    "log_every": 2,
    "eval_every": 4,
    "eval_rows": 6,
    "checkpoint_every": 4,
    "sample.tokens": 8,
}


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory) -> Path:
    """Forty files of a few lines; about a tenth of them is held out."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        body = "".join(f"def f{number}_{line}(x):\n    return x + {number * line}\n\n" for line in range(4))
        (root / f"file{number:02d}.py").write_text(body)
    return root


@pytest.fixture(scope="session")
def tiny(corpus_root):
    """A function from (workdir, changed keys) to the arguments of a tiny run of configs/2mamba.py."""

    def arguments(workdir: Path, config: str = "configs/2mamba.py", **changes: object) -> list[str]:
        values = TINY | {"data.root": corpus_root, "data.held_out_percent": 10}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        return ["--config", str(ROOT / config), "--workdir", str(workdir), *overrides]

    return arguments


@pytest.fixture
def user_error(capsys):
    """A function that runs the command line in this process and returns the one line that it must end with."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def start():
    """A function that starts the command line in a process of its own."""

    def run(arguments: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "train.main", *arguments]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return run


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The workdir of a tiny run that has ended; tests that change it work on a copy."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny(workdir)) == 0
    return workdir
