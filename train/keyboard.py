"""Ctrl-C outside the steps: at most one line and exit status 130, never a traceback.

While modules are imported, and when the work is done, there is nothing to clean up: SIGINT ends the program at once.
While it works, SIGINT raises KeyboardInterrupt, so that what is half done is taken back; while it waits for the other
processes, SIGINT kills it. During the steps it is a request (train/interruption.py). This module imports nothing that
takes time.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
