"""The tasks of `recall.py`: what each trains on, what it is tested on, and how its score is read."""

import dataclasses
from typing import Any

from train.data.copying import CopyingRows
from train.data.mqar import MQARRows
from train.data.state_tracking import StateTrackingRows
from train.errors import UserError

Rows = MQARRows | CopyingRows | StateTrackingRows
Range = tuple[int, int]
# By task: its training lengths, and those of each of its tests.
LENGTHS: dict[str, tuple[Range, tuple[Range, ...]]] = {
    "copying": ((1, 50), ((50, 50), (100, 100), (200, 200), (500, 500), (1000, 1000))),
    "parity": ((3, 40), ((40, 256),)),
    "s5": ((32, 32), ((32, 32), (64, 64), (160, 160))),
}
TASKS = ("mqar", *LENGTHS)
DATA_SEED = 0  # of all rows: seeds of members are those of their parameters and of the order of the rows


@dataclasses.dataclass(frozen=True)
class Problem:
    """A task at one size: everything that its rows depend on.

    `length`, `pairs` and `random_filler` are mqar's, the ranges of lengths are those of the others; `vocabulary` is the
    vocabulary of mqar, the alphabet of copying. What is not a task's is None.
    """

    task: str
    train_rows: int
    test_rows: int
    vocabulary: int | None = None
    length: int | None = None
    pairs: tuple[int, ...] | None = None
    random_filler: bool | None = None
    train_lengths: Range | None = None
    test_lengths: tuple[Range, ...] | None = None

    @property
    def title(self) -> str:
        """What a table says of it."""
        if self.task == "mqar":
            return f"mqar, T {self.length}, {listed(self.pairs)} pairs"
        tests = listed(map(range_name, self.test_lengths))
        return f"{self.task}, trained at length {range_name(self.train_lengths)}, tested at {tests}"

    @property
    def name(self) -> str:
        """As part of a file name; problems of different names may be the same but for their number of rows."""
        if self.task == "mqar":
            return f"mqar-{self.length}-{'+'.join(map(str, self.pairs))}"
        return f"{self.task}-{range_name(self.train_lengths)}"


def make_problem(task: str, **sizes: Any) -> Problem:
    """The problem with the sizes that are the task's, its usual ones where they are None."""
    rows = {key: sizes[key] for key in ("train_rows", "test_rows")}
    if task == "mqar":
        mine = {key: sizes[key] for key in ("length", "pairs", "random_filler")}
        return Problem(task, **rows, **mine, vocabulary=sizes["vocabulary"] or 8192)
    train, tests = LENGTHS[task]
    lengths = {
        "train_lengths": sizes["train_lengths"] or train,
        "test_lengths": tuple(sizes["test_lengths"] or tests),
    }
    alphabet = (sizes["vocabulary"] or 26) if task == "copying" else None
    return Problem(task, **rows, **lengths, vocabulary=alphabet)


def make_rows(problem: Problem) -> tuple[Rows, dict[str, Rows]]:
    """Training rows, and test rows by what is said of them: each number of pairs, each length. Raises UserError.

    Tests have equally many rows, so that the mean over tests is the mean over rows, which zoology reports.
    """
    tests: dict[str, Any]
    if problem.task == "mqar":
        changes = {"length": problem.length, "vocab_size": problem.vocabulary, "random_filler": problem.random_filler}
        train, tests = problem.pairs, {f"{pairs} pairs": (pairs,) for pairs in problem.pairs}
    else:
        train, tests = problem.train_lengths, {f"length {range_name(test)}": test for test in problem.test_lengths}
        changes = {"symbols": problem.vocabulary} if problem.task == "copying" else {"group": problem.task}
    if problem.train_rows < 1 or problem.test_rows < len(tests):
        raise UserError(
            f"--train_rows={problem.train_rows} and --test_rows={problem.test_rows} must be at least 1 and {len(tests)}"
        )
    kind, varied = {"mqar": (MQARRows, "pairs"), "copying": (CopyingRows, "lengths")}.get(
        problem.task, (StateTrackingRows, "lengths")
    )

    def rows(split: str, count: int, value: Any) -> Rows:
        return kind(seed=DATA_SEED, split=split, num_rows=count, **changes | {varied: value})

    each = problem.test_rows // len(tests)
    return rows("train", problem.train_rows, train), {
        name: rows("held_out", each, value) for name, value in tests.items()
    }


def scaled(task: str, accuracy: float) -> float:
    """Parity's accuracy as Grazzi et al. (arXiv 2411.12537) scale it, 0 of a coin; the others' as it is."""
    return (accuracy - 0.5) / 0.5 if task == "parity" else accuracy


def range_name(lengths: Range) -> str:
    """`40-256`, or `50` of a range of one length."""
    return "-".join(map(str, dict.fromkeys(lengths)))


def listed(values: Any) -> str:
    return " + ".join(map(str, values))
