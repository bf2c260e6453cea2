"""The loss curve of a run as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The object-oriented interface with its own canvas: no display is needed and pyplot's global state stays untouched.
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_loss(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws train/loss and eval/loss of the records of metrics.jsonl against the step."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (
        ("train/loss", "training batch", {"linewidth": 0.8, "color": "tab:gray"}),
        ("eval/loss", "held-out", {"marker": "o", "markersize": 3, "color": "tab:blue"}),
    ):
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot([step for step, _ in points], [loss for _, loss in points], label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
