"""Ctrl-C in the command line of generation: while text comes it ends what is there, and before that there is nothing.

An exception from a signal may land where Python prints and drops it (a callback of its garbage collector), so none is.
"""

import os
import signal
import threading
from types import FrameType


class Interruption:
    """While it is entered, in the main thread, SIGINT ends the process with one line and status 130.

    Where there is something to keep (`keeps`), the first one only sets `requested`.
    """

    def __init__(self) -> None:
        """Nothing is kept, and nothing requested."""
        self.keeps = self.requested = False
        self._before = signal.SIG_IGN

    def __enter__(self) -> "Interruption":
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
        os.write(2, b"interrupted\n")
        os._exit(130)
