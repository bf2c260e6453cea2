"""stdout and stderr that cannot end a run: a closed pipe, a terminal that is gone, characters that they do not have."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO


class LenientStream:
    """A text stream that drops what cannot be written, and escapes characters that its encoding does not have."""

    def __init__(self, stream: TextIO, name: str):
        """`name` is what the warning calls it."""
        self._stream, self._name = stream, name
        self._warned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes what can be written."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._stream.write(escaped)
        except OSError as error:
            self._warn(error)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._warn(error)

    def settle(self) -> None:
        """Sends what could not be written to nowhere: Python fails at its end where a stream cannot be flushed."""
        try:
            self._stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _warn(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        if sys.stderr is not self:
            reason = error.strerror or type(error).__name__
            print(f"warning: {self._name} cannot be written to ({reason}): the program goes on", file=sys.stderr)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Inside, what cannot be written to stdout or stderr is dropped; stderr is told of it once."""
    streams = ((redirect_stderr, sys.stderr, "stderr"), (redirect_stdout, sys.stdout, "stdout"))
    with ExitStack() as stack:
        for redirect, stream, name in streams:
            if stream is not None:  # None: it was closed before Python started
                lenient = LenientStream(stream, name)
                stack.callback(lenient.settle)
                stack.enter_context(redirect(lenient))
        yield
