"""What a run costs: seconds, tokens a second, model FLOP utilisation, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What `Meter.lap` gives, and no two runs have alike.
COSTS = (
    "tokens_per_second",
    "seconds_per_step",
    "seconds_in_data",
    "mfu",
    "memory_bytes",
    "memory_peak_bytes",
)


class Stopwatch:
    """Seconds while it runs."""

    def __init__(self) -> None:
        """Stopped, at 0."""
        self.seconds = 0.0
        self._since: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs it inside."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        """Stops it."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def resume(self) -> None:
        """Starts it again."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """The seconds since the last lap; goes on as it was."""
        runs = self._since is not None
        self.pause()
        seconds, self.seconds = self.seconds, 0.0
        if runs:
            self.resume()
        return seconds


class Meter:
    """Counts steps and the seconds that they take; `training` and `data` are its watches."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None, device: Any):
        """`peak` is in operations a second of all devices; memory is that of `device`."""
        self._tokens, self._flops, self._peak, self._device = tokens_per_step, flops_per_token, peak, device
        self.training, self.data = Stopwatch(), Stopwatch()

    def lap(self, steps: int) -> dict[str, Any]:
        """The figures of the last `steps` steps.

        tokens_per_second; seconds_per_step; seconds_in_data, the part of a step in which the program gets the next
        batch, while the device works on the one before; mfu, from 0 to 1, or "unknown" where the peak is; memory_bytes
        and memory_peak_bytes of one device, where it tells.
        """
        seconds = self.training.lap() / steps
        rate = self._tokens / seconds
        memory = self._device.memory_stats() or {}
        names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
        return {
            "tokens_per_second": rate,
            "seconds_per_step": seconds,
            "seconds_in_data": self.data.lap() / steps,
            "mfu": "unknown" if self._peak is None else self._flops * rate / self._peak,
        } | {name: memory[key] for name, key in names.items() if key in memory}
