"""What `attention.py` makes of its rows: derived figures, a table, where the chunked kernels overtake, a plot."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

from attention_rows import BOTH, CUDNN, FORWARD, Row
from matplotlib.figure import Figure

from pallas_kernels.chunked.crossovers import Crossover

# Products of the causal half, 2 (T^2 / 2) K flops each: two forward (scores, outputs), five backward (the scores again,
# the gradients of weights, values, queries and keys).
PRODUCTS = {FORWARD: 2, BOTH: 7}
GIB, MIB = 2**30, 2**20
MEMORY = (("temporary_bytes", MIB, ".0f"), ("peak_bytes", GIB, ".2f"))
STYLES = {FORWARD: ("-", "o"), BOTH: ("--", "x")}
SHOWN_MILLISECONDS = 0.005  # of a kernel
SAME = ("device", "sizes", "versions")  # of runs that are shown together


def records_of(rows: list[Row], ceilings: dict[str, float]) -> list[dict]:
    """The rows with what follows from them. The flops are the quadratic form's, whatever form a row has."""
    peers = {(row.tokens, row.direction): row.milliseconds for row in rows if row.attention == CUDNN}
    records = [{"label": row.label} | dataclasses.asdict(row) for row in rows]
    for row, record in zip(rows, records):
        if ms := row.milliseconds:
            flops = PRODUCTS[row.direction] * row.batch * row.heads * row.tokens**2 * row.head_dim
            record |= {"nanoseconds_per_token": 1e6 * ms / (row.batch * row.tokens)}
            record |= {"tflops": flops / ms / 1e9, "of_ceiling": flops / ms / 1e9 / ceilings["tflops"]}
            if peer := peers.get((row.tokens, row.direction)):
                record["over_cudnn"] = ms / peer
    return records


def table(records: list[dict]) -> str:
    """Markdown. Times are CUPTI's where they do not say wall."""
    columns = {"nanoseconds_per_token": "ns/token", "tflops": "TFLOP/s", "of_ceiling": "of ceiling"}
    columns |= {"over_cudnn": "over cuDNN", "error_over_bound": "error"}
    formats = {"nanoseconds_per_token": ".1f", "tflops": ".0f", "over_cudnn": ".3f"}
    header = ["T", "B", "direction", "attention", "ms", *columns.values(), "scratch, MiB", "peak, GiB"]
    lines = [f"| {' | '.join(header)} |", f"|---:|---:|---|---|{'---:|' * (len(header) - 4)}"]
    for r in records:
        cells = [r["tokens"], r["batch"], r["direction"], r["label"]]
        cells.append(r["note"] or f"{r['milliseconds']:.3f}{' wall' * (r['clock'] == 'wall')}")
        cells += [format(r[key], formats.get(key, ".2f")) if r.get(key) else "" for key in columns]
        cells += ["" if r[key] is None else format(r[key] / unit, f) for key, unit, f in MEMORY]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def tables_of_kernels(records: list[dict]) -> list[str]:
    """A Markdown table of each row whose kernels were timed one by one."""
    tables = []
    for r in records:
        lines = [f"| {name} | {ms:.3f} |" for name, ms in r.get("kernels", {}).items() if ms >= SHOWN_MILLISECONDS]
        if lines:
            tables.append(
                "\n".join([f"| {r['label']}, {r['direction']}, T = {r['tokens']} | ms |", "|---|---:|", *lines])
            )
    return tables


def crossovers_of(records: list[dict], device: str) -> list[Crossover]:
    """Where the chunked kernels overtake the quadratic ones: the ratio of their times passes 1 between two lengths.

    A line between the logarithms says where; `sequences` are those of the longer one.
    """
    names = "attention", "score", "head_dim", "direction", "tokens"
    timed = {tuple(r[name] for name in names): r for r in records if r["milliseconds"]}
    ratios = {}
    for (attention, *key, tokens), record in sorted(timed.items(), key=lambda item: item[0][-1]):
        if attention == "chunked" and (peer := timed.get(("quadratic", *key, tokens))):
            ratio = math.log(record["milliseconds"] / peer["milliseconds"])
            ratios.setdefault(tuple(key), []).append((tokens, ratio, record["batch"] * record["heads"]))
    found = []
    for key, points in ratios.items():
        for (before, slower, _), (after, faster, sequences) in itertools.pairwise(points):
            if slower >= 0 > faster:
                tokens = before * (after / before) ** (slower / (slower - faster))
                found.append(Crossover(device, *key, sequences, 100 * round(tokens / 100)))
    return found


def plot(records: list[dict], crossovers: list[Crossover], title: str, path: Path) -> None:
    """Time per token, and over that of cuDNN's softmax in the same run, against T; log-log."""
    labels, lengths = [*dict.fromkeys(r["label"] for r in records)], sorted({r["tokens"] for r in records})
    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(title)
    panels = {"nanoseconds_per_token": "time per token, ns", "over_cudnn": "time / cuDNN softmax"}
    axes = figure.subplots(1, len(panels))
    for ax, (key, name) in zip(axes, panels.items()):
        for (number, label), direction in itertools.product(enumerate(labels), STYLES):
            here = [r for r in records if (r["label"], r["direction"]) == (label, direction) and r.get(key)]
            if here:
                here = sorted(here, key=lambda r: r["tokens"])
                style = dict(zip(("linestyle", "marker"), STYLES[direction]), color=f"C{number}")
                ax.plot([r["tokens"] for r in here], [r[key] for r in here], label=f"{label}, {direction}", **style)
        for crossover in crossovers:
            ax.axvline(crossover.tokens, color="k", linestyle=STYLES[crossover.direction][0], linewidth=0.8)
            text = f"{crossover.score} chunked faster, {crossover.direction}: T > {crossover.tokens:,}"
            ax.annotate(text, (crossover.tokens, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7)
        ax.set(xlabel="T, tokens", ylabel=name, xscale="log", yscale="log")
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside center right", fontsize=7)
    figure.savefig(path, dpi=120)


def merged(paths: list[Path]) -> dict:
    """The reports of several runs as one: rows and seeds of all, and what has to be the same.

    Raises:
      ValueError: what is wrong with which file.
    """
    reports = []
    for path in paths:
        try:
            reports.append(json.loads(path.read_text()))
            missing = {*SAME, "rows"} - reports[-1].keys()
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"--plot {path}: expected a JSON file that this script has written: {error}") from error
        if missing:
            raise ValueError(f"--plot {path}: expected a JSON file that this script has written: no {min(missing)}")
        for key in SAME:
            if reports[-1][key] != reports[0][key]:
                raise ValueError(f"--plot {path}: {key} is {reports[-1][key]}, in {paths[0]} {reports[0][key]}")
    rows = [row for report in reports for row in report["rows"]]
    return {key: reports[0][key] for key in SAME} | {"rows": sorted(rows, key=lambda r: (r["tokens"], r["direction"]))}
