"""A run from its configuration to its figures: builds, resumes, trains, evaluates, saves, and shows what came out.

The parameters after a step depend on the configuration, the data and the number of the step alone: nothing is drawn at
random but the initial parameters and the order of the rows, both from `seed`. So a run that was killed and started
again ends with the same bits, and with the same metrics (times aside), as one that never stopped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from train.checkpoint import Checkpoints
from train.configuration import build_model, decay_steps, validate
from train.data import abstract_batch, held_out_batches, training_batches
from train.errors import UserError, one_line
from train.evaluation import evaluate
from train.metrics import MetricsWriter, read_metrics
from train.plot import plot_loss
from train.progress import ProgressDisplay, Stopwatch, held_out_figures
from train.sample import sample_text
from train.sharding import RULES, make_mesh
from train.step import TrainState, make_eval_step, make_init, make_optimizer, make_train_step, warmup_linear
from train.task import Task, make_task
from train.tokenizers import keep_tokenizer
from train.workdir import claim, replace
from twomamba_jax.layers import LanguageModel


@dataclass(frozen=True)
class Run:
    """What stays the same while a run goes on; `abstract` is its state as ShapeDtypeStructs with shardings."""

    config: ConfigDict
    workdir: Path
    task: Task
    model: LanguageModel
    abstract: TrainState
    init: Callable[[jax.Array], TrainState]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def evaluate(self, params: Any) -> dict[str, float]:
        """The held-out metrics of `params`."""
        batches = held_out_batches(self.task.held_out, self.config.batch_size, self.config.eval_rows)
        return evaluate(self.eval_step, params, batches, self.task.targets_per_byte)


def run(config: ConfigDict, workdir: Path, warn: Callable[[str], None], console: Console) -> None:
    """Trains `config` in `workdir`, from the latest checkpoint there if there is one, and prints the figures.

    Raises UserError for everything that the user can put right; nothing is written before the configuration has
    passed all checks. One device or many, the mesh of `config.mesh` spans all that JAX sees.
    """
    validate(config)
    mesh = make_mesh(config.mesh, config.batch_size)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):

        def report(message: str) -> None:
            console.print(message, highlight=False, soft_wrap=True)

        current = build(config, workdir, mesh, report)
        claim(workdir, config, current.task.identity)
        if current.task.tokenizer is not None:
            keep_tokenizer(config.data.tokenizer, workdir)
        checkpoints = Checkpoints(workdir, config.checkpoints_kept)
        try:
            restored = checkpoints.restore(current.abstract, warn)
            state, position = restored or (current.init(jax.random.key(config.seed)), None)
            start = int(state.step)
            count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            console.print(
                f"{config.name}-{config.size}: {config.variant}, {count:,} parameters, {mesh.size} device(s), "
                f"step {start} of {config.steps}, workdir {workdir}",
                highlight=False,
                soft_wrap=True,
            )
            if start >= config.steps:
                console.print(f"the run in {workdir} is finished", highlight=False, soft_wrap=True)
            else:
                state = train(current, state, position, checkpoints, console)
        finally:
            checkpoints.close()
        finish(current, state, console)


def build(config: ConfigDict, workdir: Path, mesh: Mesh, report: Callable[[str], None] = lambda _: None) -> Run:
    """The data, the model and its jitted steps, traced but not run; under `jax.set_mesh(mesh)` and the rules.

    `report` is told what takes time.
    """
    model = build_model(config)
    task = make_task(config, report)
    schedule = warmup_linear(config.optimizer.learning_rate, config.optimizer.warmup_steps, decay_steps(config))
    options = {key: config.optimizer[key] for key in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
    optimizer = make_optimizer(schedule, **options)
    try:
        init, abstract = make_init(model, optimizer, mesh)
        eval_step = make_eval_step(model, abstract, mesh)
        jax.eval_shape(eval_step, abstract.params, abstract_batch(config.batch_size, config.length))
    except ValueError as error:
        # Tracing is where the library says that a form or an implementation cannot run this model.
        raise UserError(one_line(error)) from error
    train_step = make_train_step(model, optimizer, schedule, abstract, mesh)
    return Run(config, workdir, task, model, abstract, init, train_step, eval_step)


def train(
    run: Run, state: TrainState, position: dict[str, Any] | None, checkpoints: Checkpoints, console: Console
) -> TrainState:
    """Makes the steps that are left after `state`, and returns the last state; `position` is the data's, if resumed."""
    config = run.config
    start = int(state.step)
    batches = training_batches(run.task.train, config.batch_size, config.seed)
    if position is not None:
        batches.set_state(position)
    writer = MetricsWriter(run.workdir / "metrics.jsonl", start)
    try:
        with ProgressDisplay(console, start, config.steps) as display:
            batch = next(batches)
            train_step = run.train_step.lower(state, batch).compile()
            watch, logged = Stopwatch(), start
            for step in range(start + 1, config.steps + 1):
                if step > start + 1:
                    # Waiting for the step before keeps the bar honest, and the device is never more than one ahead.
                    batch = next(batches)
                    jax.block_until_ready(metrics)
                state, metrics = train_step(state, batch)
                display.advance(step)
                last = step == config.steps
                log, evaluates, saves = (
                    last or step % every == 0
                    for every in (config.log_every, config.eval_every, config.checkpoint_every)
                )
                if not (log or evaluates or saves):
                    continue
                loss = float(metrics["loss"])
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at step {step}: lower optimizer.learning_rate or set optimizer.clip_norm"
                    )
                record: dict[str, Any] = {"step": step}
                if log:
                    seconds_per_step = watch.lap() / (step - logged)
                    record |= {f"train/{key}": float(value) for key, value in metrics.items()}
                    record["tokens_per_second"] = config.batch_size * config.length / seconds_per_step
                    logged = step
                watch.pause()
                if evaluates:
                    record |= run.evaluate(state.params)
                if log or evaluates:
                    writer.write(record)
                    display.report(record, seconds_per_step if log else 0.0)
                if saves:
                    checkpoints.save(state, batches.get_state())
                watch.resume()
    finally:
        writer.close()
        batches.close()
    return state


def finish(run: Run, state: TrainState, console: Console) -> None:
    """Draws the curve and the sample of a run that has made its last step, and prints its held-out figures."""
    name = f"{run.config.name}-{run.config.size} ({run.config.variant})"
    records = read_metrics(run.workdir / "metrics.jsonl")
    step = int(state.step)
    plot_loss(records, name, run.workdir / "curve.png")
    sample = sample_text(run.model, state.params, run.task, run.config.sample, run.config.seed)
    replace(run.workdir / "sample.txt", sample)
    console.print(sample, highlight=False, markup=False, soft_wrap=True)
    figures = next((record for record in records if record["step"] == step and "eval/loss" in record), None)
    figures = run.evaluate(state.params) if figures is None else figures
    console.print(f"step {step}: {held_out_figures(figures)}", highlight=False, soft_wrap=True)
