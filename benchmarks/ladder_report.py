"""The ladder's table and plots, of all rows that lie in a directory."""

import collections
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kept_rows import kept_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata, spearmanr

from configs import base
from train.workdir import replace
from twomamba_jax import VARIANTS, parse_pattern

Results = Sequence[dict[str, Any]]
REFERENCE = "softmax"
OF_MEDIUM = "2mamba", "2mamba-e"  # the paper's losses of these are of its medium model, all others of its small one
MOST_DRAWN = 18  # mixers in a plot
CHOSEN, REPORTED = 0, 1  # the half of the held-out documents that rates are chosen on, and the one that is reported


def mixer_name(variant: str, settings: Sequence[str]) -> str:
    """What a table calls the rows of a variant with these settings."""
    return f"{variant} ({', '.join(settings)})" if settings else variant


def read_rows(out: Path, corpus: str, size: str, steps: int) -> list[dict[str, Any]]:
    """What the trained rows of one table left, in the order of their names, each with its `mixer_name` as `mixer`."""
    table = {"corpus": corpus, "size": size, "steps": steps}
    return [
        result | {"mixer": mixer_name(result["variant"], result.get("settings", ()))}  # rows of before had none
        for result in kept_rows(out)
        if all(result[key] == value for key, value in table.items())
    ]


def without_shared_settings(results: Results) -> tuple[list[dict[str, Any]], list[str]]:
    """The results without the settings that all of them have, and these settings."""
    settings = [result.get("settings", ()) for result in results]
    shared = [setting for setting in settings[0] if all(setting in others for others in settings)]
    own = [[setting for setting in mine if setting not in shared] for mine in settings]
    named = [
        result | {"settings": mine, "mixer": mixer_name(result["variant"], mine)} for result, mine in zip(results, own)
    ]
    return named, shared


def best_rate(results: Results, mixer: str, seed: int) -> float | None:
    """The learning rate with the lowest loss on the half that rates are chosen on; None where nothing is trained."""
    losses = {
        result["learning_rate"]: result["losses"][CHOSEN]
        for result in results
        if result["mixer"] == mixer and result["seed"] == seed
    }
    return min(losses, key=losses.get) if losses else None


def rates_tried(results: Results, mixer: str) -> int:
    """How many learning rates the best one was chosen from."""
    return len({result["learning_rate"] for result in results if result["mixer"] == mixer})


def at_best(results: Results) -> dict[str, list[dict[str, Any]]]:
    """By mixer the rows at its best rate, one a seed, the lowest mean first; the lowest seed decides on the rate."""
    chosen = {}
    for mixer in {result["mixer"] for result in results}:
        rows = [result for result in results if result["mixer"] == mixer]
        rate = best_rate(rows, mixer, min(row["seed"] for row in rows))
        chosen[mixer] = [row for row in rows if row["learning_rate"] == rate]
    return dict(sorted(chosen.items(), key=lambda item: mean_loss(item[1])))


def mean_loss(rows: Results) -> float:
    """The mean over seeds of the reported loss."""
    return statistics.mean(row["losses"][REPORTED] for row in rows)


def deviation(rows: Results) -> float | None:
    """The deviation over seeds of the reported loss; None of one seed."""
    losses = [row["losses"][REPORTED] for row in rows]
    return statistics.stdev(losses) if len(losses) > 1 else None


def report(out: Path, corpus: str, size: str, steps: int) -> str:
    """Writes OUT/CORPUS-SIZE-STEPS.md and its plots, -tokens.png, -losses.png and -states.png; returns the table.

    Settings that all rows have are said once, and not with every mixer. The plots have the lowest losses alone.
    """
    results = read_rows(out, corpus, size, steps)
    if not results:
        return f"no row of {corpus}, {size}, {steps} steps is trained in {out}"
    results, shared = without_shared_settings(results)
    best, stem = at_best(results), f"{corpus}-{size}-{steps}"
    tables = summary(best, results), every_row(results), beside_paper(results), origin(results, shared)
    text = "\n\n".join(filter(None, tables)) + "\n"
    replace(out / f"{stem}.md", text)
    drawn = dict(list(best.items())[:MOST_DRAWN])
    draw_curves(drawn, out / f"{stem}-tokens.png")
    draw_losses(drawn, out / f"{stem}-losses.png")
    draw_states(drawn, size, out / f"{stem}-states.png")
    return text


def summary(best: dict[str, list[dict[str, Any]]], results: Results) -> str:
    """A row a mixer, at its best rate; "over softmax" is over that with the same settings."""
    lines = [
        "| mixer | rate | of rates | seeds | held-out loss | deviation | over softmax | parameters | bytes of state "
        "| tokens/s | peak GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mixer, rows in best.items():
        loss, spread, peak = mean_loss(rows), deviation(rows), rows[0]["memory_peak_bytes"]
        reference = best.get(mixer_name(REFERENCE, rows[0].get("settings", ())))
        cells = (
            mixer,
            f"{rows[0]['learning_rate']:g}",
            rates_tried(results, mixer),
            len(rows),
            f"{loss:.4f}",
            "" if spread is None else f"{spread:.4f}",
            "" if reference is None else f"{loss - mean_loss(reference):+.4f}",
            f"{rows[0]['parameters']:,}",
            f"{rows[0]['state_bytes']:,}",
            f"{rows[0]['tokens_per_second']:,.0f}",
            "" if peak is None else f"{peak / 2**30:.2f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def every_row(results: Results) -> str:
    """The losses at all rates: on the half that rates are chosen on, the half that is reported, and in training.

    Gradient norms are the median and the largest of the logged ones after a tenth of the steps.
    """
    lines = [
        "| mixer | rate | seed | chosen on | reported | training | gradient norm | largest | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in sorted(results, key=lambda row: (row["mixer"], row["learning_rate"], row["seed"])):
        losses = f"{row['losses'][CHOSEN]:.4f} | {row['losses'][REPORTED]:.4f} | {row['train_loss']:.4f}"
        norms = [norm for step, norm in row.get("gradient_norms", ()) if step > row["steps"] / 10]
        norms = f"{statistics.median(norms):.2f} | {max(norms):.2f}" if norms else " | "  # rows of before have none
        lines.append(
            f"| {row['mixer']} | {row['learning_rate']:g} | {row['seed']} | {losses} | {norms} | {row['commit'][:12]} |"
        )
    return "\n".join(lines)


def beside_paper(results: Results) -> str:
    """Losses beside the paper's of the same variants, by its order, and the two orders' correlation (Spearman's).

    Of all of them at one learning rate, that at which most are trained, and one seed; of what the paper has at `small`
    alone, with equal ranks for its equal losses. Empty for fewer than three.
    """
    seed = min(row["seed"] for row in results)
    by_rate: dict[float, dict[str, float]] = collections.defaultdict(dict)
    for row in results:
        variant = VARIANTS.get(row["mixer"])  # None: a pattern, or with settings of its own
        if row["seed"] == seed and variant and variant.paper_loss is not None and row["mixer"] not in OF_MEDIUM:
            by_rate[row["learning_rate"]][row["mixer"]] = row["losses"][REPORTED]
    if not by_rate:
        return ""
    rate, losses = max(by_rate.items(), key=lambda item: len(item[1]))
    if len(losses) < 3:
        return ""
    names = sorted(losses, key=lambda name: (VARIANTS[name].paper_loss, losses[name]))
    paper, ours = [VARIANTS[name].paper_loss for name in names], [losses[name] for name in names]
    lines = [
        f"| mixer, at {rate:g} | the paper's loss, nats a token | held-out loss | the paper's rank | rank |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, *cells in zip(names, paper, ours, rankdata(paper), rankdata(ours)):
        lines.append(f"| {name} | {cells[0]:.2f} | {cells[1]:.4f} | {cells[2]:g} | {cells[3]:g} |")
    return "\n".join([*lines, "", f"Rank correlation of the two orders: {spearmanr(paper, ours).statistic:.3f}."])


def origin(results: Results, settings: Sequence[str]) -> str:
    """What the figures were made of and on, with the settings of all of them."""
    digests = sorted({row["identity"]["digest"] for row in results})
    places = sorted({f"{row['device']}, {row['workers']} rows at a time" for row in results})
    versions = sorted({", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in results})
    said = f"All rows with {', '.join(settings)}. " if settings else ""
    return f"{said}Corpus: SHA-256 {', '.join(digests)}. On {'; '.join(places)}. {'; '.join(versions)}."


def draw_curves(best: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out loss against tokens, of the first seed."""
    figure, axes = _canvas("tokens", "held-out loss, nats a token")
    axes.set_yscale("log")  # the lowest curves are the closest
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    # There are ten colours: the eleventh curve has the first one's, dashed.
    for number, (mixer, rows) in enumerate(best.items()):
        look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "o"}
        label = f"{mixer} ({rows[0]['learning_rate']:g})"
        axes.plot(*zip(*rows[0]["curve"]), markersize=3, label=label, **look)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def draw_losses(best: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The last loss of each mixer, with its deviation over seeds."""
    figure, axes = _canvas("held-out loss at the end, nats a token", "")
    names = list(best)[::-1]
    spreads = [deviation(best[name]) or 0.0 for name in names]
    axes.errorbar([mean_loss(best[name]) for name in names], names, xerr=spreads, fmt="o", capsize=3)
    figure.savefig(path, dpi=120)


def draw_states(best: dict[str, list[dict[str, Any]]], size: str, path: Path) -> None:
    """The last loss against the bytes of state, of mixers below twice the lowest loss.

    A state that is all a growing cache has a line up to its size at the end of a row, from that at the first token.
    """
    figure, axes = _canvas("bytes of state", "held-out loss at the end, nats a token")
    axes.set_xscale("log")
    model = base.get_config("ladder", REFERENCE, size)
    lowest = min(map(mean_loss, best.values()))
    for number, (mixer, rows) in enumerate(best.items()):
        loss, state = mean_loss(rows), rows[0]["state_bytes"]
        if loss > 2 * lowest:
            continue
        look = {"color": f"C{number % 10}", "marker": "osD"[number // 10 % 3], "linestyle": "none"}
        if all(layer.score == "exp" for layer in parse_pattern(rows[0]["variant"], model.model.num_layers)):
            axes.hlines(loss, state / model.length, state, colors=look["color"], linestyles=":")
        axes.plot(state, loss, label=mixer, **look)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def _canvas(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes
