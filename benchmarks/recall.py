"""Recall and state tracking by variant: `python benchmarks/recall.py --task mqar --out runs/recall`.

Trains two layers of each variant, without MLPs, on a synthetic task: `mqar` (zoology, arXiv 2312.04927), `copying`
(arXiv 2402.01032), `parity` and `s5` (arXiv 2411.12537, 2404.08819); see them in `train/data/`.
All learning rates are trained at once with seed 0, then the other seeds at once at the best of them. A row ends where
its best member (of the seeds: its worst) reaches 99 % of the test, and after --epochs otherwise.

In float32, products have the device's default precision, which is TF32 on NVIDIA's.

Each row is kept when it is done: the same command after a kill goes on, and another one with the same --out adds its
tables to OUT/recall.md.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import clone  # noqa: F401
import numpy as np
from kept_rows import current_commit, kept_row
from recall_members import NUM_LAYERS
from recall_report import best_rate, report
from recall_row import Row, load, train_row
from recall_tasks import TASKS, Problem, Range, make_problem, make_rows

from train.errors import UserError, one_line
from twomamba_jax import parse_pattern

VARIANTS = ("softmax", "mamba2", "mamba2s", "2mamba", "2mamba-dt-long", "2mamba-e", "softmax,2mamba-dt-long")
LEARNING_RATES = tuple(np.logspace(-4, -2, 4).tolist())  # zoology's


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises UserError."""
    parser = argparse.ArgumentParser(
        "python benchmarks/recall.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where rows and tables are kept")
    add("--task", choices=TASKS, default="mqar")
    add("--variants", nargs="+", default=VARIANTS, metavar="NAME", help="names of VARIANTS, or patterns of two layers")
    add("--d_models", nargs="+", type=int, default=[64, 128], metavar="SIZE", help="width, and size of the one head")
    add("--length", type=int, default=256, help="T of mqar")
    add("--pairs", nargs="+", type=_numbers, default=[(16,), (64,)], metavar="N", help="of mqar; 4,8,16 is a mixture")
    add("--random_filler", action="store_true", help="any tokens between the queries of mqar, and not 0")
    add("--vocabulary", type=int, help="of mqar (8192), or the letters of copying (26)")
    add("--train_lengths", type=_range, metavar="A-B", help="of the other tasks: 3-40, or 32 alone")
    add("--test_lengths", nargs="+", type=_range, metavar="A-B", help="a test each")
    add("--train_rows", type=int, default=100_000)
    add("--test_rows", type=int, default=3_000, help="of all tests together")
    add("--batch_size", type=int, help="default: 512, and 256 for mqar from T 256 on")
    add("--epochs", type=int, default=16, help="at most; the learning rates fall over all of them")
    add("--stop_at", type=float, default=0.99, help="the accuracy at which a row ends")
    add("--learning_rates", nargs="+", type=float, default=LEARNING_RATES, metavar="RATE")
    add("--seeds", type=int, default=3, help="how many: the first at all rates, the others at the best")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    add("--commit", help="of the code, where git does not tell")
    options = parser.parse_args(arguments)
    wide = options.task == "mqar" and options.length >= 256
    options.batch_size = options.batch_size or (256 if wide else 512)
    if min(options.epochs, options.seeds, options.batch_size, *options.d_models, *options.learning_rates) <= 0:
        raise UserError("--epochs, --seeds, --batch_size, --d_models and --learning_rates must be positive")
    if options.batch_size > options.train_rows:
        raise UserError(f"--batch_size={options.batch_size} must be at most --train_rows={options.train_rows}")
    for variant in options.variants:
        try:
            parse_pattern(variant, NUM_LAYERS)
        except ValueError as error:
            raise UserError(f"--variants: {error}") from error
    return options


def problems(options: argparse.Namespace) -> list[Problem]:
    """The problems of the command line: of mqar, one for each of --pairs."""
    keys = ("train_rows", "test_rows", "vocabulary", "length", "random_filler", "train_lengths", "test_lengths")
    sizes = {key: vars(options)[key] for key in keys}
    several = options.pairs if options.task == "mqar" else [None]
    return [make_problem(options.task, pairs=pairs, **sizes) for pairs in several]


def train_mixer(options: argparse.Namespace, problem: Problem, d_model: int, variant: str) -> None:
    """Trains what is not kept yet of one line of a table: all rates, then the other seeds."""

    def train(members: Iterator[tuple[float, int]], stop_when: str) -> dict:
        row = Row(
            problem,
            d_model,
            variant,
            tuple(members),
            options.epochs,
            options.batch_size,
            options.stop_at,
            stop_when,
            options.dtype,
        )
        kept = kept_row(options.out, row.name)
        return kept or train_row(row, load(problem), options.out, options.commit, lambda line: print(line, flush=True))

    rate = best_rate([train(((rate, 0) for rate in options.learning_rates), "best")])
    if options.seeds > 1:
        train(((rate, seed) for seed in range(1, options.seeds)), "all")


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 1 where a row failed, 2 for a mistake of the user."""
    try:
        options = parse_arguments(arguments)
        asked = problems(options)
        for problem in asked:
            make_rows(problem)  # a mistake in the last problem is better found before the first is trained
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.commit = options.commit or current_commit()
    failures = []
    for problem, d_model, variant in itertools.product(asked, options.d_models, options.variants):
        try:
            train_mixer(options, problem, d_model, variant)
        except Exception as error:  # of memory, say: the rest of the grid is worth having
            failures.append(f"{problem.name}, {d_model}, {variant}: {one_line(error)}")
            print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
    print(report(options.out))
    return 1 if failures else 0


def _numbers(text: str) -> tuple[int, ...]:
    """`4,8,16`, of the command line."""
    return tuple(int(number) for number in text.split(","))


def _range(text: str) -> Range:
    """`3-40`, or `32` for 32 alone."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
