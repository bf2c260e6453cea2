"""Programs that take turns on one device, so that what drifts in it (clocks, temperature) meets all of them alike.

Each is a process of its own, which prepares itself at once and then works a turn whenever it is told to.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class DiedError(Exception):
    """The process ended without an answer."""


class Program:
    """A process that `serve`s."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        """Starts it, with `environment` besides this process's own."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=os.environ | environment, **pipes)

    def ask(self) -> None:
        """Has it begin its next turn. Raises DiedError."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DiedError from None

    def fileno(self) -> int:
        """Of the pipe that its answers come by, for `select`."""
        return self._process.stdout.fileno()

    def answer(self) -> Any:
        """What it found in the turn that it was asked for. Raises DiedError."""
        line = self._process.stdout.readline()
        if not line:
            raise DiedError
        return json.loads(line)

    def dismiss(self) -> None:
        """Has it end."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def close(self) -> None:
        """Ends it, and waits for its end: then its memory is free."""
        self.dismiss()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(turns: Iterator[Any]) -> None:
    """Prepares by the first of `turns`, and answers every line of standard input with the next, as JSON.

    Whatever else is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    next(turns)
    for _ in sys.stdin:
        answers.write(json.dumps(next(turns)) + "\n")
        answers.flush()
