"""One rung of the accuracy ladder: a model trained through `train.loop`, and what is kept of it."""

import dataclasses
import functools
import shutil
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from kept_rows import keep_row, kept_row, origin, row_path, variant_in_name
from ml_collections import ConfigDict
from rich.console import Console

from configs import base
from train.configuration import apply_overrides, validate
from train.data.rows import PACKINGS, held_out_batches
from train.data.tokenized import Split
from train.errors import UserError
from train.evaluation import evaluate
from train.loop import Run, run
from train.observe.metrics import read_metrics
from train.step import TrainState
from twomamba_jax import cache_bytes

# What each corpus sets in a configuration, where it lies in directory ROOT.
CORPORA: dict[str, dict[str, str]] = {
    "stdlib": {"data.root": "ROOT"},
    "prose": {
        "data.source": "files",
        "data.paths": "ROOT/text.jsonl.gz",
        "data.tokenizer": "ROOT/tokenizer.json",
        "model.vocab_size": "8192",
    },
    # Spread over all held-out documents. 160 MB of text have 2,556 held-out rows of 2,048: to evaluate on all of them
    # every time would cost a seventh of a run.
    "c": {"data.source": "files", "data.paths": "ROOT/text.jsonl.gz", "eval_rows": "1024"},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model to train: everything that its loss depends on, but for the code and the corpus' version.

    `settings` are what the configuration has in place of its own values, each `KEY=VALUE`.
    """

    corpus: str
    size: str
    variant: str
    learning_rate: float
    seed: int
    steps: int
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As a file name."""
        variant = variant_in_name(self.variant)
        row = f"{self.corpus}-{self.size}-{self.steps}-{variant}-{self.learning_rate:g}-{self.seed}"
        return "-".join([row, *self.settings])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where rows are trained and kept, and what is said of the code with them."""

    out: Path
    root: Path | None = None
    commit: str = "unknown"
    workers: int = 0

    def result(self, row: Row) -> Path:
        """The file that a trained row leaves."""
        return row_path(self.out, row.name)

    def read(self, row: Row) -> dict[str, Any] | None:
        """What a trained row left; None where it is not trained."""
        return kept_row(self.out, row.name)


def make_config(row: Row, root: Path | None = None) -> ConfigDict:
    """The configuration that a row is trained by; without a root the corpus is Python's own, or of `corpora.py`.

    Raises UserError for settings that no configuration has, or that the row itself says.
    """
    root = root or (None if row.corpus == "stdlib" else Path("runs/corpora") / row.corpus)
    config = base.get_config(name="ladder", variant=row.variant, size="nano" if row.size == "nano" else "lab")
    if row.size not in ("nano", "lab"):  # trained as lab is: its vocabulary is that of bytes, its schedule for one pass
        config.size = row.size
        config.model.update(base.SIZES[row.size] | {"vocab_size": config.model.vocab_size})
    overrides = {key: value.replace("ROOT", str(root)) for key, value in CORPORA[row.corpus].items()} | {
        "seed": row.seed,
        "steps": row.steps,
        "optimizer.learning_rate": row.learning_rate,
        "checkpoints_kept": 1,
        "log_every": 10,
    }
    if row.size not in ("nano", "lab"):  # evaluations take 2 % of a run so, and checkpoints are of gigabytes
        overrides |= dict.fromkeys(("eval_every", "checkpoint_every"), max(1, row.steps // 5))
    settings = [(key, text) for key, _, text in (setting.partition("=") for setting in row.settings)]
    for key, _ in settings:
        if key in overrides or key.startswith("data."):
            raise UserError(f"--set {key}: a row says this itself: use --corpus, --root, --steps, --seeds, ...")
    apply_overrides(config.lock(), [*((key, str(value)) for key, value in overrides.items()), *settings])
    validate(config)
    return config


def train_row(row: Row, place: Place) -> None:
    """Trains the row, goes on where a run of it that was killed has saved, and leaves `place.result(row)`.

    Raises KeyboardInterrupt where a signal asked the run to save and stop.
    """
    workdir = place.out / "runs" / row.name
    at_end = functools.partial(keep, row, place)
    step = run(make_config(row, place.root), workdir, print, Console(quiet=True), at_end)
    if step < row.steps:
        raise KeyboardInterrupt(f"saved at step {step} of {row.steps}: the same command goes on from there")
    shutil.rmtree(workdir)  # its checkpoints are large, and its figures are kept


def keep(row: Row, place: Place, current: Run, state: TrainState, console: Console) -> None:
    """Writes what the table needs of a run that has made its last step."""
    config, model = current.config, current.model.config
    records = read_metrics(current.workdir / "metrics.jsonl")
    tokens = config.batch_size * config.length
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    peaks = [record["memory_peak_bytes"] for record in records if "memory_peak_bytes" in record]
    found = {
        "losses": halves_losses(current, state.params),
        "curve": [(record["step"] * tokens, record["eval/loss"]) for record in records if "eval/loss" in record],
        "train_loss": records[-1]["train/loss"],
        "gradient_norms": [(record["step"], record["train/grad_norm"]) for record in records if "train/loss" in record],
        "skipped": int(state.skipped),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": cache_bytes(model, 1, config.length, dtype=current.model.execution.dtype),
        "tokens_per_second": statistics.median(speeds),
        "memory_peak_bytes": peaks[-1] if peaks else None,
        "workers": place.workers,
        "identity": current.task.identity,
    }
    keep_row(place.out, row.name, dataclasses.asdict(row) | found | origin(place.commit))


def halves_losses(current: Run, params: Any) -> list[float]:
    """Nats a token on each half of the held-out documents: a rate is chosen on one and reported on the other."""
    config, task = current.config, current.task
    losses = []
    for documents in halves(task.held_out.documents):
        rows = PACKINGS[config.data.packing](documents, config.length, task.tokenizer.eos_id)
        limit = None if config.eval_rows is None else -(-config.eval_rows // 2)
        batches = held_out_batches(rows, config.batch_size, limit, *current.rows)
        losses.append(evaluate(current.eval_step, params, map(current.place, batches), None)["eval/loss"])
    return losses


def halves(split: Split) -> tuple[Split, Split]:
    """The documents of even and of odd number; how many bytes each half has is nobody's question here."""
    pieces = [split.tokens[start:end] for start, end in zip(split.starts, split.starts[1:])]
    return tuple(_joined(pieces[first::2]) for first in (0, 1))


def _joined(pieces: list[np.ndarray]) -> Split:
    starts = np.cumsum([0, *map(len, pieces)])
    return Split(np.concatenate(pieces), starts, num_bytes=0)
