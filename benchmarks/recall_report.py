"""The tables of `recall.py`, of all rows that lie in a directory."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kept_rows import kept_rows
from recall_tasks import Problem, scaled

from train.workdir import replace

Results = Sequence[dict[str, Any]]
# Of T 256 and 4 to 64 pairs: Log-Linear Attention, arXiv 2506.04761, five seeds; by d_model.
PUBLISHED = {
    "Transformer": {16: ">= 99", 32: ">= 99", 64: ">= 99"},
    "Mamba-2": {16: "46.9", 32: "75.1", 64: "89.6"},
    "Gated DeltaNet": {16: "38.4", 32: "79.0", 64: ">= 99"},
}


def report(out: Path) -> str:
    """Writes OUT/recall.md, a table for each problem and way of training; returns it."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for result in kept_rows(out):
        same = {key: result["row"][key] for key in ("problem", "epochs", "batch_size", "stop_at", "dtype")}
        tables.setdefault(json.dumps(same), []).append(result)
    if not tables:
        return f"no row is trained in {out}"
    text = "\n\n".join(map(table, tables.values()))
    replace(out / "recall.md", text + "\n")
    return text


def table(results: Results) -> str:
    """A problem's table: a line for each mixer and width, at the rate that is best at the first seed."""
    row = results[0]["row"]
    problem = Problem(**row["problem"])
    tests = list(results[0]["scores"])
    columns = ["mixer", "d_model", "rate", "seeds", "scaled accuracy" if problem.task == "parity" else "accuracy"]
    columns += ["deviation", "exact", *(tests if len(tests) > 1 else ())]
    columns += ["ended by", "epochs", "steps", "seconds", "parameters", "bytes of state"]
    lines = [f"**{problem.title}**", "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for (d_model, variant), group in sorted(by_mixer(results).items()):
        lines.append(f"| {variant} | {d_model} | {' | '.join(map(str, cells(problem.task, group)))} |")
    if (problem.task, problem.length, tuple(problem.pairs or ())) == ("mqar", 256, (4, 8, 16, 32, 64)):
        lines += ["", published()]
    return "\n".join([*lines, "", notes(results)])


def by_mixer(results: Results) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The results of each (d_model, variant)."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["row"]["d_model"], result["row"]["variant"]), []).append(result)
    return groups


def best_rate(group: Results) -> float:
    """The learning rate with the highest accuracy at the lowest seed."""
    first = min(seed for result in group for _, seed in result["row"]["members"])
    tried = [
        (accuracy, rate)
        for result in group
        for accuracy, (rate, seed) in zip(result["accuracies"], result["row"]["members"])
        if seed == first
    ]
    return max(tried)[1]


def at_rate(group: Results, rate: float) -> dict[int, tuple[dict[str, Any], int]]:
    """By seed, the result and the member in it that was trained at this rate."""
    return {
        seed: (result, member)
        for result in group
        for member, (member_rate, seed) in enumerate(result["row"]["members"])
        if member_rate == rate
    }


def cells(task: str, group: Results) -> list[Any]:
    """All columns of a line but its first two. Epochs, steps and seconds are of the row that chose the rate."""
    rate = best_rate(group)
    by_seed = at_rate(group, rate)
    found, chosen = by_seed.values(), by_seed[min(by_seed)][0]
    accuracies = [scaled(task, result["accuracies"][member]) for result, member in found]

    def mean(score: str, *tests: str) -> float:
        return statistics.mean(result["scores"][test][score][member] for result, member in found for test in tests)

    tests = list(chosen["scores"])
    single = [f"{mean('accuracy', test):.4f} ({mean('exact', test):.4f})" for test in tests] if len(tests) > 1 else []
    return [
        f"{rate:.3g}",
        len(accuracies),
        f"{statistics.mean(accuracies):.4f}",
        f"{statistics.stdev(accuracies):.4f}" if len(accuracies) > 1 else "",
        f"{mean('exact', *tests):.4f}",
        *single,
        f"{chosen['row']['stop_at']:.0%}" if chosen["reached"] else "epochs",
        chosen["epochs"],
        f"{chosen['steps']:,}",
        f"{chosen['seconds']:.0f}",
        f"{chosen['parameters']:,}",
        f"{chosen['state_bytes']:,}",
    ]


def published() -> str:
    """Figures of the same task by others; their number of epochs, seeds and layers' details differ."""
    widths = list(PUBLISHED["Transformer"])
    lines = [
        "Published, in percent (Log-Linear Attention, arXiv 2506.04761, five seeds):",
        "",
        f"| mixer | {' | '.join(f'd_model {width}' for width in widths)} |",
        f"|---|{'---:|' * len(widths)}",
    ]
    lines += [f"| {name} | {' | '.join(map(figures.get, widths))} |" for name, figures in PUBLISHED.items()]
    return "\n".join(lines)


def notes(results: Results) -> str:
    """How the table's rows were trained, by what and on what."""
    row, problem = results[0]["row"], Problem(**results[0]["row"]["problem"])
    rates = sorted({rate for result in results for rate, _ in result["row"]["members"]})
    origins = {
        (
            result["commit"][:12],
            result["device"],
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        )
        for result in results
    }
    made = "; ".join(f"commit {commit} on {device}, {versions}" for commit, device, versions in sorted(origins))
    return (
        f"Accuracy is the mean over test rows, exact the share of rows without a mistake, each of the last epoch; the "
        f"rate is chosen by the same accuracy. {problem.train_rows:,} training rows, {problem.test_rows:,} test rows, "
        f"batch {row['batch_size']}, at most {row['epochs']} epochs (the cosine's length), a row ends at "
        f"{row['stop_at']:.0%}; rates {', '.join(f'{rate:.3g}' for rate in rates)}; {row['dtype']}. Rows' digests "
        f"{', '.join(sorted({result['digest'][:12] for result in results}))}; {made}."
    )
