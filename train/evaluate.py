"""The figures of a run's model on a split of its data, or of other data: `python -m train.evaluate --workdir DIR`."""

from train.keyboard import INTERRUPTED, interrupts_raised, take_interrupts

if __name__ == "__main__":
    take_interrupts()  # before the imports below, which take seconds

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from train.command_line import Parser, warn
from train.compilation_cache import keep_programs
from train.configuration import apply_overrides, validate
from train.cross_entropy import Sums
from train.data.rows import Batch, held_out_batches
from train.data.stream import StreamedRows
from train.data.task import Task, make_task
from train.data.tokenizers import has_file, kept_path, load_kept_tokenizer
from train.errors import UserError, one_line
from train.evaluation import ContextLosses, evaluate, token_losses
from train.harness import run_tasks
from train.memory import enough_memory
from train.output import lenient_output
from train.paths import expand_user
from train.restore import build_anywhere, read_saved_config, restore_on_one_device
from train.scoring import Scorer

DESCRIPTION = """\
Evaluates the model of a working directory: loss in nats a token, perplexity, accuracy and, of text, bits a byte, then
the loss by the length of the context. The data is the run's; --config.data.KEY=VALUE names other data, and
--config.length another length of the rows; --tasks runs tasks of lm-evaluation-harness instead. Mistakes are one line
on stderr and exit status 2."""

OVERRIDE = "--config."
OVERRIDABLE = ("data.", "length", "batch_size")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The options, and the overrides as (dotted key, text). Raises UserError for a wrong command line."""
    parser = Parser("python -m train.evaluate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a run of train.main, or an import")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--rows", type=int, metavar="N", help="spread evenly over the split; default: all of it")
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="by held-out loss, or by step")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    parser.add_argument("--tasks", metavar="A,B", help="of lm-evaluation-harness, in place of the run's own data")
    parser.add_argument("--include_path", metavar="DIR", help="of task files besides the harness's own")
    parser.add_argument("--num_fewshot", type=int, metavar="N", help="of tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="of tasks: their first N documents")
    overrides = []
    for argument in arguments:
        if argument.startswith(OVERRIDE):
            key, equals, text = argument.removeprefix(OVERRIDE).partition("=")
            if not equals:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            if not key.startswith(OVERRIDABLE):
                raise UserError(f"{argument} is not of the data: expected --config.data.KEY, length or batch_size")
            overrides.append((key, text))
    options = parser.parse_args([one for one in arguments if not one.startswith(OVERRIDE)])
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows={options.rows} must be at least 1; leave it out for all of the split")
    options.workdir = Path(expand_user("--workdir", options.workdir))
    if options.include_path is not None:
        options.include_path = Path(expand_user("--include_path", options.include_path))
    return options, overrides


def read_config(workdir: Path) -> ConfigDict:
    """The configuration of the run in `workdir`, with the types that overrides need. Raises UserError without a run."""
    try:
        saved = read_saved_config(workdir)
        config = base.get_config(name=saved["name"], variant=saved["variant"], size="nano")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {workdir / 'config.json'}: {one_line(error)}") from error
    for key, value in saved.items():
        group = isinstance(value, dict)
        if group and key not in config:
            config[key] = ConfigDict()
        for name, one in (value if group else {key: value}).items():
            (config[key] if group else config)[name] = tuple(one) if isinstance(one, list) else one
    return config


def read_run(workdir: Path, overrides: list[tuple[str, str]]) -> tuple[ConfigDict, Task]:
    """The configuration of the run in `workdir` with the overrides, and its data. Raises UserError."""
    config = read_config(workdir)
    apply_overrides(config, overrides)
    validate(config)
    if "tokenizer" in config.data and has_file(config.data.tokenizer):
        # The run's own copy: the file that it was made of may be gone.
        load_kept_tokenizer(config.data, workdir)
        config.data.tokenizer = str(kept_path(config.data.tokenizer, workdir))
    return config, make_task(config, lambda _: None)


def evaluate_run(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """The figures: `step`, `split`, `rows`, those of `train.evaluation.evaluate`, and `by_context`.

    Raises UserError for what the user can put right.
    """
    config, task = read_run(options.workdir, overrides)
    model = build_anywhere(config)
    rows, targets_per_byte = _split(task, options.split)
    params, step = restore_on_one_device(options.workdir, model, options.checkpoint, warn)
    measure = jax.jit(lambda params, batch: token_losses(model, params, batch))
    by_context = ContextLosses()

    def eval_step(params: Any, batch: Batch) -> Sums:
        losses, hits = map(np.asarray, measure(params, batch))
        by_context.add(batch, losses)
        weights = np.asarray(batch["weights"], np.float64)
        return Sums(*(np.sum(weights * values) for values in (losses, hits, np.ones_like(weights))))

    batches = held_out_batches(rows, config.batch_size, options.rows)
    figures = evaluate(eval_step, params, batches, targets_per_byte)
    count = len(rows) if options.rows is None else min(options.rows, len(rows))
    return {"step": step, "split": options.split, "rows": count} | figures | {"by_context": by_context.table()}


def evaluate_tasks(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """The figures of `options.tasks` by lm-evaluation-harness: `step` and `tasks`. Raises UserError."""
    config = read_config(options.workdir)
    apply_overrides(config, overrides)
    tokenizer = load_kept_tokenizer(config.data, options.workdir)
    model = build_anywhere(config)
    params, step = restore_on_one_device(options.workdir, model, options.checkpoint, warn)
    scorer = Scorer(model, params, tokenizer, config.batch_size, config.length)
    names = [name for name in options.tasks.split(",") if name]
    return {
        "step": step,
        "tasks": run_tasks(scorer, names, options.include_path, options.num_fewshot, options.limit),
    }


def _split(task: Task, name: str) -> tuple[Any, float | None]:
    """The rows of a split, and its targets over its bytes."""
    if name == "held_out":
        return task.held_out, task.targets_per_byte
    if isinstance(task.train, StreamedRows):
        raise UserError("--split train is a stream, which has no end: set --config.data.streaming=False")
    documents = getattr(task.train, "documents", None)
    return task.train, None if documents is None else documents.targets_per_byte


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as two tables."""
    if "tasks" in figures:
        for task, values in figures["tasks"].items():
            shown = (
                f"{key.removesuffix(',none')} {value:.5f}" for key, value in values.items() if type(value) is float
            )
            print(f"{task}: {', '.join(shown)}")
        return
    print(f"step {figures['step']}, {figures['rows']:,} rows of the {figures['split']} split")
    for key, value in figures.items():
        if key.startswith("eval/"):
            print(f"{key.removeprefix('eval/'):>16} {value:.5f}")
    print(f"{'context':>16} {'loss':>9} {'targets':>12}")
    for one in figures["by_context"]:
        context = str(one["to"]) if one["from"] == one["to"] else f"{one['from']}-{one['to']}"
        print(f"{context:>16} {one['loss']:9.5f} {one['targets']:12,.0f}")


@lenient_output()
def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a mistake of the user, 130 for an interrupt."""
    try:
        options, overrides = parse(arguments)
        keep_programs(warn)
        with interrupts_raised(), enough_memory("make --config.batch_size or --config.length smaller"):
            figures = (evaluate_tasks if options.tasks else evaluate_run)(options, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(figures, default=str)) if options.json else show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
