"""Loss and needles by the length of the context, as a plot: `python benchmarks/contexts.py FIGURES.json`.

FIGURES.json, of several models: {NAME: {"by_context": {LENGTH: [...]}, "needle": [...]}} with what
`python -m train.evaluate --config.length=LENGTH --json` prints as `by_context`, and the lines of
`python benchmarks/needle.py --json`. The plot is FIGURES.png beside it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import clone  # noqa: F401
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLES = "-", "--", ":"  # of the lengths of rows, in the order in which they stand


def draw(models: Mapping[str, Any], path: Path) -> None:
    """On the left the loss by tokens seen, a line style a length of rows; on the right the needle's accuracy."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, needles = figure.subplots(1, 2)
    for number, (name, model) in enumerate(models.items()):
        color = f"C{number}"
        for style, (length, ranges) in zip(STYLES, model["by_context"].items()):
            seen, loss = zip(*((one["to"], one["loss"]) for one in ranges))
            losses.plot(seen, loss, style, color=color, marker="o", markersize=3, label=f"{name}, rows of {length}")
        lengths, found = zip(*((one["length"], one["accuracy"]) for one in model["needle"]))
        needles.plot(lengths, found, color=color, marker="o", markersize=3, label=name)
    losses.set(xlabel="tokens of the document seen", ylabel="held-out loss, nats a token", yscale="log")
    needles.set(xlabel="tokens of the row", ylabel="share of the needle's tokens found", ylim=(0, 1))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:g}")
    for axes in (losses, needles):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        "python benchmarks/contexts.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path, metavar="FIGURES.json")
    path = parser.parse_args(arguments).figures
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
