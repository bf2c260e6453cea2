"""Rows of a benchmark of training steps and the processes that make them, each of which waits for its turn."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import step_row
from step_row import Row
from turns import DiedError

from train.errors import UserError, one_line


class Turns(Protocol):
    """What makes a row: a `turns.Program`, or several as one."""

    def ask(self) -> None:
        """Begins a turn. Raises DiedError."""

    def answer(self) -> dict:
        """What came of it. Raises DiedError."""

    def close(self) -> None:
        """Ends it."""


class Runs:
    """The rows and what makes them. A row that cannot go on has a note, and takes no more turns."""

    def __init__(self, rows: Sequence[Row], starters: Sequence[Callable[[], Turns]]):
        """Starts nothing; `starters` do, one for each row. They may raise UserError."""
        self.rows, self._starters, self._programs = list(rows), starters, {}

    def start(self, index: int) -> None:
        """Has a row prepare itself."""
        try:
            self._programs[index] = self._starters[index]()
        except UserError as error:
            self.rows[index] = dataclasses.replace(self.rows[index], note=one_line(error))

    def turn(self, *indices: int) -> None:
        """Has rows compiled, or take their next turns, several at the same time; says what came of them."""
        live = [index for index in indices if index in self._programs]
        for index in live:
            self._attend(index, lambda program: program.ask())
        for index in live:
            if answer := self._attend(index, lambda program: program.answer()):
                self.rows[index] = step_row.as_row(answer)
            if self.rows[index].note:
                self.stop(index)
            print(progress(self.rows[index]), file=sys.stderr, flush=True)

    def _attend[T](self, index: int, what: Callable[[Turns], T]) -> T | None:
        """What a row's program does; None, and a note, where it died."""
        if index not in self._programs:
            return None
        try:
            return what(self._programs[index])
        except DiedError:
            self.rows[index] = dataclasses.replace(self.rows[index], note="its process died")
            self.stop(index)
            return None

    def stop(self, index: int) -> None:
        """Ends a row's process."""
        if program := self._programs.pop(index, None):
            program.close()


def progress(row: Row) -> str:
    """One line about where a row is."""
    name = " ".join(filter(None, (row.variant, row.implementation, row.setting, f"{row.batch} x {row.length}")))
    if row.note:
        return f"{name}: {row.note}"
    if not row.losses:
        return f"{name}: compiled in {row.compile_seconds:.1f} s"
    times = ", ".join(f"{time:.2f}" for time in row.milliseconds_by_turn)
    return f"{name}: {row.tokens_per_second:,.0f} tokens/s, {times} ms, loss {row.losses[-1]:.4f}"
