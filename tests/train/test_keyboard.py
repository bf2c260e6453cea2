"""Ctrl-C at any moment is at most one line, and exit status 130."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from train import main as program
from train.keyboard import end_at_once, interrupts_raised

ROOT = Path(train.__file__).parents[1]

INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"
MOMENTS = {
    "at_the_start": INTERRUPT,
    "in_a_finaliser": f"""
class Thing:
    def __del__(self):
        {INTERRUPT}
with interrupts_raised():
    Thing()
""",
    "behind_the_work": f"""
with interrupts_raised():
    pass
{INTERRUPT}
""",
}


def interpreter(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_ends_the_program_at_once(moment):
    opening = "import os, signal\nfrom train.keyboard import *\ntake_interrupts()\n"
    process = interpreter("-c", f"{opening}{MOMENTS[moment]}\nos._exit(1)")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


@pytest.mark.parametrize("module", ["train.main", "train.generate", "train.evaluate", "train.convert"])
def test_an_interrupt_during_the_imports_is_one_line(module):
    with interpreter("-X", "importtime", "-m", module, "--help") as process:
        lines = iter(process.stderr.readline, "")
        while not next(lines).rstrip().endswith("jax.version"):  # one of the first of JAX's
            pass
        process.send_signal(signal.SIGINT)
        errors = [line for line in lines if not line.startswith("import time:")]
    assert (process.returncode, errors) == (130, ["interrupted\n"])


def test_an_interrupt_of_the_work_raises_for_a_program_only():
    before = signal.getsignal(signal.SIGINT)
    with interrupts_raised():
        assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, end_at_once)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_raised():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is end_at_once
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_run_is_built_names_the_command(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", interrupt)
    assert program.main(tiny(tmp_path / "run")) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted; to resume from the latest checkpoint: python -m train.main --config ")
