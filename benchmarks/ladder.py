"""Accuracy of the variants side by side: `python benchmarks/ladder.py --size nano --out runs/ladder`.

Trains every variant at every learning rate with the first seed, through `train.loop`; then, at the rate that is best
on one half of the held-out documents, with the other seeds. Each row is kept when it is done: the same command after a
kill goes on, and another one with the same --out adds to the table. The table and its two plots, OUT/CORPUS-SIZE-STEPS,
give the losses on the other half of the documents.

`nano` is for two CPU cores, `lab` for one GPU, where several --workers share it. `small` has the layers of the paper's
small model and all else of `lab`: 4,600 steps are one pass of the C corpus.
"""

import argparse
import dataclasses
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import clone  # noqa: F401
from kept_rows import current_commit
from ladder_report import best_rate, mixer_name, read_rows, report
from ladder_row import CORPORA, Place, Row, make_config, train_row

from train.errors import UserError
from twomamba_jax import parse_pattern


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a size trains where the command line does not say."""

    steps: int
    variants: tuple[str, ...]
    learning_rates: tuple[float, ...]


PLANS = {
    "nano": Plan(400, ("softmax", "2mamba", "2mamba-dt-long"), (2e-3, 4e-3)),
    "lab": Plan(
        1200,
        (
            "softmax",
            "softmax-conv2",
            "linear",
            "mamba2",
            "mamba2s",
            "2mamba",
            "2mamba-dt",
            "2mamba-long",
            "2mamba-dt-long",
            "2mamba-dt-long-norm",
            "softmax,2mamba-dt-long*,softmax",
            "2mamba-e",
            "2mamba-e-long",
            "softmax,2mamba-e-long*,softmax",
        ),
        (1e-3, 1.5e-3, 2e-3, 3e-3),
    ),
    "small": Plan(4600, ("softmax", "2mamba-dt-long"), (7e-4, 1e-3)),
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with the size's plan where they are not given. Raises UserError."""
    parser = argparse.ArgumentParser(
        "python benchmarks/ladder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where rows, table and plots are kept")
    add("--size", choices=PLANS, default="nano")
    add("--corpus", choices=CORPORA, default="stdlib")
    add("--root", type=Path, metavar="DIR", help="of the corpus; default: Python's source, runs/corpora/CORPUS")
    add("--variants", nargs="+", metavar="NAME", help="names of VARIANTS, or patterns of them")
    add("--learning_rates", nargs="+", type=float, metavar="RATE")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="the first is trained at every rate")
    add("--steps", type=int, help="that the learning rate falls over")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration: optimizer.b2=0.95; other rows")
    add("--workers", type=int, default=1, help="processes at a time, each with a row; 0: this one alone")
    add("--commit", help="of the code, where git does not tell")
    options = parser.parse_args(arguments)
    plan = PLANS[options.size]
    options.steps = options.steps or plan.steps
    options.variants = options.variants or plan.variants
    options.learning_rates = options.learning_rates or plan.learning_rates
    if min(options.steps, *options.learning_rates) <= 0 or min(options.workers, *options.seeds) < 0:
        raise UserError("--steps and --learning_rates must be positive, --workers and --seeds not negative")
    for variant in options.variants:
        try:
            parse_pattern(variant, 8)
        except ValueError as error:
            raise UserError(f"--variants: {error}") from error
    make_config(make_row(options, options.variants[0], options.learning_rates[0], 0), options.root)
    return options


def make_row(options: argparse.Namespace, variant: str, rate: float, seed: int) -> Row:
    """A row of the command line."""
    return Row(options.corpus, options.size, variant, rate, seed, options.steps, tuple(options.set))


def train_rows(rows: Iterable[Row], place: Place) -> list[str]:
    """Trains the rows that are not there yet; says which could not be, and why."""
    waiting = [row for row in rows if place.read(row) is None]
    if not place.workers:
        for row in waiting:
            train_row(row, place)
            print(f"{row.name}: trained", flush=True)
        return []
    failures = []
    # A process for each row: memory that one has used at its peak is not counted for the next.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(place.workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(train_row, row, place): row for row in waiting}
        for future in as_completed(futures):
            row, error = futures[future], future.exception()
            if error is not None:
                failures.append(f"{row.name}: {type(error).__name__}: {error}")
            print(f"{row.name}: {'trained' if error is None else error}", flush=True)
    return failures


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 1 where a row failed, 2 for a mistake of the user."""
    try:
        options = parse_arguments(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place = Place(options.out, options.root, options.commit or current_commit(), options.workers)

    first, *others = options.seeds
    failures = train_rows(
        (make_row(options, variant, rate, first) for rate in options.learning_rates for variant in options.variants),
        place,
    )
    trained = read_rows(options.out, options.corpus, options.size, options.steps)
    rates = {variant: best_rate(trained, mixer_name(variant, options.set), first) for variant in options.variants}
    failures += train_rows(
        (
            make_row(options, variant, rate, seed)
            for seed in others
            for variant, rate in rates.items()
            if rate is not None
        ),
        place,
    )
    print(report(options.out, options.corpus, options.size, options.steps))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
