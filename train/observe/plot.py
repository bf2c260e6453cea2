"""Loss curves of runs over each other as a PNG: `python -m train.observe.plot RUN... [--out PNG]`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The object-oriented interface with its own canvas: no display is needed and pyplot's global state stays untouched.
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.errors import UserError
from train.observe.metrics import read_metrics


def plot_runs(runs: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draws train/loss (thin) and eval/loss (with marks) of the records of each named run against the step."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines, labels = [], []
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        training, held_out = points_of(records, "train/loss"), points_of(records, "eval/loss")
        lines += axes.plot(*training, color=color, linewidth=0.8, alpha=0.5)
        lines += axes.plot(*held_out, color=color, marker="o", markersize=3.5)
        last = f" (last {held_out[1][-1]:.3f})" if held_out[1] else ""
        # A name may have bytes that are not UTF-8, as the path of a workdir.
        shown = name.encode("utf-8", "backslashreplace").decode()
        labels += [f"{shown}: training batch", f"{shown}: held-out{last}"]
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    # Labels given here, and not to the lines, may start with an underscore; and dollars in them are no formula.
    for text in axes.legend(lines, labels).get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


def points_of(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of the records that have a figure under `key` (a skipped step has None)."""
    points = [(record["step"], record[key]) for record in records if is_figure(record.get(key))]
    return [step for step, _ in points], [value for _, value in points]


def is_figure(value: Any) -> bool:
    """Whether a value can be drawn: a number in the range of float32, as every loss is."""
    return isinstance(value, int | float) and abs(value) <= float(np.finfo(np.float32).max)


def read_run(run: Path) -> list[dict[str, Any]]:
    """The records of a workdir. Raises UserError where it has none."""
    records = read_metrics(run / "metrics.jsonl")
    if not records:
        raise UserError(f"{run} has no metrics.jsonl with a record: give workdirs of runs")
    return records


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as short as they can be while different paths have different ones."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser("python -m train.observe.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the workdir of a run")
    parser.add_argument("--out", type=Path, default=Path("runs.png"), metavar="PNG", help="default: runs.png")
    options = parser.parse_args(arguments)
    try:
        if options.out.suffix != ".png":
            raise UserError(f"--out {options.out} must end in .png")
        plot_runs(dict(zip(short_names(options.runs), map(read_run, options.runs))), options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
