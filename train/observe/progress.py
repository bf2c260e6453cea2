"""What a run shows while it trains: a bar on a terminal, plain lines anywhere else."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


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
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
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

    def report(self, record: Mapping[str, Any]) -> None:
        """Shows a record of metrics.jsonl."""
        parts = []
        if "train/loss" in record:
            loss, mfu = record["train/loss"], record["mfu"]
            left = duration(record["seconds_per_step"] * (self._steps - record["step"]))
            parts += [
                "step skipped" if loss is None else f"loss {loss:.4f}",
                f"{record['tokens_per_second']:,.0f} tokens/s",
                f"MFU {mfu}" if isinstance(mfu, str) else f"MFU {100 * mfu:.1f} %",
                f"{left} left",
            ]
            if record["train/skipped"]:
                parts.insert(1, f"{record['train/skipped']} skipped")
            self._bar.update(self._task, description="  ".join(parts))
        if "eval/loss" in record:
            parts.append(held_out_figures(record))
        if not self._console.is_terminal or "eval/loss" in record:
            self._console.out(f"step {record['step']}/{self._steps}  " + "  ".join(parts), highlight=False)


def held_out_figures(record: Mapping[str, Any]) -> str:
    """The held-out metrics of a record in words."""
    if record["eval/loss"] is None:
        return "held-out loss not finite"
    bits = f"{record['eval/bits_per_byte']:.4f} bits per byte, " if "eval/bits_per_byte" in record else ""
    return f"held-out loss {record['eval/loss']:.4f} nats, {bits}accuracy {100 * record['eval/accuracy']:.2f} %"
