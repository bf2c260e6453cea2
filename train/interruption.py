"""SIGTERM and SIGINT as a request: the loop finishes its step, saves, and the program ends with status 0."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While it is entered, the first SIGTERM or SIGINT sets `requested`; a second SIGINT raises KeyboardInterrupt.

    Only a main thread can take signals; entered in another it does nothing, and whoever owns the main thread decides.
    """

    def __init__(self) -> None:
        """Takes nothing yet."""
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
