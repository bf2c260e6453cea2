"""Output that cannot be written, or not in its encoding, ends no run; text with markup in it is shown as it is."""

import io
import os
import shutil
import sys
from pathlib import Path

import pytest

from train.main import main
from train.output import lenient_output


@pytest.fixture
def closed_pipe():
    """A text stream whose reader has gone; a line is written at its end, what is left in its buffer when flushed."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1, encoding="utf-8") as stream:
        yield stream


def test_a_closed_stdout_is_said_once(closed_pipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    with lenient_output():
        for number in range(3):
            print(number, flush=True)
    closed_pipe.flush()  # as Python does at its end
    assert capsys.readouterr().err == "warning: stdout cannot be written to (Broken pipe): the program goes on\n"
    assert sys.stdout is closed_pipe


def test_a_closed_stderr_says_nothing(closed_pipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    with lenient_output():
        print("warning", file=sys.stderr, flush=True)
        print("text")
    assert capsys.readouterr().out == "text\n"


def test_characters_that_stdout_does_not_have_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    with lenient_output():
        print("caf\xe9 \u2192 \udcff")
    assert stream.buffer.getvalue() == b"caf\xe9 \\u2192 \\udcff\n"


def test_a_run_with_a_closed_stdout_ends_well(finished, tiny, monkeypatch, closed_pipe, capsys):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main(tiny(finished)) == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_a_workdir_with_markup_and_patterns_is_shown(finished, tiny, tmp_path, capsys):
    """What Rich takes for markup and for an emoji, and what Orbax would take for a pattern."""
    workdir = Path(shutil.copytree(finished, tmp_path / "[" / "old]:x: [1]"))
    assert main(tiny(workdir)) == 0
    shown = capsys.readouterr()
    assert f", step 12 of 12, workdir {workdir}\nthe run in {workdir} is finished\n" in shown.out
    assert shown.err == ""
