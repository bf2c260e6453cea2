"""Ctrl-C outside the steps: at most one line and exit status 130, never a traceback.

While modules are imported, and when the work is done, there is nothing to clean up: SIGINT ends the program at once.
While it works, SIGINT raises KeyboardInterrupt, so that what is half done is taken back; while it waits for the other
processes, SIGINT kills it. During the steps (train/interruption.py) and while text is generated it is a request: an
exception from a signal may land where Python prints and drops it. This module imports nothing that takes time.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def end_at_once(*_: object) -> None:
    """Ends the process with one line and `INTERRUPTED`; a signal handler."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def take_interrupts() -> None:
    """From now on SIGINT ends the process by `end_at_once`; one that is ignored stays ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    signal.signal(signal.SIGINT, end_at_once)
    sys.unraisablehook = _end_where_swallowed


def _end_where_swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
    # Python prints and then ignores what is raised in a finaliser or a callback of the garbage collector; JAX has one.
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        end_at_once()
    sys.__unraisablehook__(unraisable)


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt where `take_interrupts` was called; elsewhere this changes nothing."""
    if signal.getsignal(signal.SIGINT) is not end_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end_at_once)


@contextmanager
def interrupts_kill() -> Iterator[None]:
    """Inside, SIGINT has its default, which needs no Python: where C++ waits, a Python handler runs when it is done.

    This changes nothing where SIGINT is ignored, and in another thread than the main one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class InterruptRequest:
    """While it is entered, in the main thread, SIGINT ends the process as `end_at_once` does.

    Where there is something to keep (`keeps`), the first one only sets `requested`.
    """

    def __init__(self) -> None:
        """Nothing is kept, and nothing requested."""
        self.keeps = self.requested = False
        self._before = signal.SIG_IGN

    def __enter__(self) -> "InterruptRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.keeps and not self.requested:
            self.requested = True
            return
        end_at_once()
