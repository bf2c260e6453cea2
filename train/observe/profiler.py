"""A window of steps under JAX's profiler: `--config.profile.start=100 --config.profile.steps=5`."""

from pathlib import Path

import jax


class ProfilerWindow:
    """Traces steps `start` to `start` + `steps` - 1 into `directory`; nothing where `start` is None."""

    def __init__(self, start: int | None, steps: int, directory: Path):
        """Nothing is traced yet."""
        self._start, self._steps, self._directory = start, steps, directory
        self._traces = False

    def before(self, step: int) -> None:
        """Starts or ends the trace where `step` is the one to do so; the steps before it must be done."""
        if self._start is None:
            return
        if step == self._start:
            jax.profiler.start_trace(self._directory)
            self._traces = True
        elif step == self._start + self._steps:
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._traces:
            jax.profiler.stop_trace()
            self._traces = False
