"""What a run shows while it trains: a bar on a terminal, plain lines anywhere else."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Stopwatch:
    """Seconds spent training, with evaluation, checkpoints and compilation left out."""

    def __init__(self) -> None:
        """Starts at once."""
        self.seconds = 0.0
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the watch."""
        self.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Starts it again."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """The seconds since the last lap; starts the next."""
        self.pause()
        seconds, self.seconds = self.seconds, 0.0
        self.resume()
        return seconds


def duration(seconds: float) -> str:
    """Seconds as text, such as 1h05m, 2m10s or 9s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class ProgressDisplay:
    """Loss, tokens a second and the time left, as a bar where `console` is a terminal and as lines elsewhere."""

    def __init__(self, console: Console, start: int, steps: int):
        """From step `start`, which is made, to `steps`."""
        self._console = console
        self._steps = steps
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def report(self, record: Mapping[str, float], seconds_per_step: float) -> None:
        """Shows a record of metrics.jsonl; `seconds_per_step` gives the time left."""
        parts = []
        if "train/loss" in record:
            left = duration(seconds_per_step * (self._steps - record["step"]))
            parts += [
                f"loss {record['train/loss']:.4f}",
                f"{record['tokens_per_second']:,.0f} tokens/s",
                f"{left} left",
            ]
            self._bar.update(self._task, description="  ".join(parts))
        if "eval/loss" in record:
            parts.append(held_out_figures(record))
        if not self._console.is_terminal or "eval/loss" in record:
            self._console.print(
                f"step {record['step']}/{self._steps}  " + "  ".join(parts), highlight=False, soft_wrap=True
            )


def held_out_figures(record: Mapping[str, float]) -> str:
    """The held-out metrics of a record in words."""
    bits = f"{record['eval/bits_per_byte']:.4f} bits per byte, " if "eval/bits_per_byte" in record else ""
    return f"held-out loss {record['eval/loss']:.4f} nats, {bits}accuracy {100 * record['eval/accuracy']:.2f} %"
