"""A run from its configuration to its figures: builds, resumes, trains, evaluates, saves, and shows what came out.

The parameters after a step depend on the configuration, the data and the number of the step alone: nothing is drawn at
random but the initial parameters and the order of the rows, both from `seed`. So a run that was killed and started
again ends with the same bits, and with the same metrics (times aside), as one that never stopped.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from rich.console import Console

from train.checkpoint import Checkpoints
from train.configuration import build_model, build_schedule
from train.data.rows import Batch, abstract_batch, held_out_batches, training_batches
from train.data.task import Task, make_task
from train.data.tokenizers import keep_tokenizer
from train.errors import UserError, one_line
from train.evaluation import evaluate
from train.interruption import Interruption
from train.layer_loop import choose_layer_loop, compiler_options
from train.lock import WorkdirLock
from train.observe.flops import peak_flops, training_flops_per_token
from train.observe.meter import Meter
from train.observe.metrics import only_finite, read_metrics
from train.observe.plot import plot_runs
from train.observe.profiler import ProfilerWindow
from train.observe.progress import ProgressDisplay, held_out_figures
from train.observe.sample import sample_text
from train.observe.trackers import check_trackers, open_trackers
from train.processes import first_before_others, on_first
from train.random_key import random_key
from train.sharding import RULES, batch_sharding, check_dimensions, make_mesh, rows_of_process
from train.step import TrainState, make_begin, make_eval_step, make_init, make_optimizer, make_train_step
from train.workdir import claim, replace, writing
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
    begin: Callable[[Any], TrainState]  # from parameters alone
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    batch_sharding: NamedSharding
    rows: tuple[int, int]  # as `rows_of_process` gives them, of this process

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """The batch on the devices: each process has the rows of it that its devices hold, with all their tokens."""
        shape = self.config.batch_size, self.config.length
        return {
            key: jax.make_array_from_process_local_data(self.batch_sharding, rows, shape) for key, rows in batch.items()
        }

    def evaluate(self, params: Any) -> dict[str, float]:
        """The held-out metrics of `params`."""
        config = self.config
        batches = held_out_batches(self.task.held_out, config.batch_size, config.eval_rows, *self.rows)
        batches = map(self.place, batches)
        return evaluate(self.eval_step, params, batches, self.task.targets_per_byte)

    def make_meter(self) -> Meter:
        """What the steps cost, on the devices that JAX sees."""
        flops = training_flops_per_token(self.model.config, self.abstract.params, self.config.length)
        tokens = self.config.batch_size * self.config.length
        return Meter(tokens, flops, peak_flops(jax.devices()), jax.local_devices()[0])


def run(
    config: ConfigDict,
    workdir: Path,
    warn: Callable[[str], None],
    console: Console,
    at_end: Callable[[Run, TrainState, Console], None] | None = None,
) -> int:
    """Trains `config` in `workdir`, from the latest checkpoint there if there is one; after the last step, `at_end`.

    `at_end` takes the run and its last state; None is `finish`, which draws and prints what came out.

    Returns the step that the run is at: below `config.steps` where a signal asked it to save and stop. Raises UserError
    for everything that the user can put right; `config` has passed `validate`, nothing but a token cache is written
    before it has passed the other checks, and nothing in a workdir that another program holds. One device or many, the
    mesh of `config.mesh` spans all that JAX sees. Of several processes all call this, with the same configuration and
    workdir; only the first locks the workdir, writes and prints.
    """

    def report(message: str) -> None:
        console.out(message, highlight=False)

    check_trackers(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), ExitStack() as stack:
        current = build(config, workdir, mesh, report)

        def take_workdir() -> None:
            stack.enter_context(WorkdirLock(workdir, warn))
            make_workdir(current)

        on_first(take_workdir)
        with Interruption(mesh) as interruption, closing(Checkpoints(workdir, config.checkpoints_kept)) as checkpoints:
            restored = checkpoints.restore(current.abstract, warn, current.begin)
            state, position = restored or (current.init(random_key(config.seed)), None)
            start = int(state.step)
            count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            report(
                f"{config.name}-{config.size}: {config.variant}, {count:,} parameters, {mesh.size} device(s) of "
                f"{jax.process_count()} process(es), step {start} of {config.steps}, workdir {workdir}"
            )
            if start >= config.steps:
                report(f"the run in {workdir} is finished")
            else:
                state = train(current, state, position, checkpoints, interruption, console)
            checkpoints.wait()
            if int(state.step) >= config.steps:
                (at_end or finish)(current, state, console)
            return int(state.step)


def build(config: ConfigDict, workdir: Path, mesh: Mesh, report: Callable[[str], None] = lambda _: None) -> Run:
    """The data, the model and its jitted steps, traced but not run; under `jax.set_mesh(mesh)` and the rules.

    `report` is told what takes time.
    """
    check_dimensions(config, mesh)
    sharding = batch_sharding(mesh)
    rows = rows_of_process(sharding, config.batch_size, jax.process_index())
    model = build_model(config)
    task = first_before_others(lambda: make_task(config, report))
    schedule = build_schedule(config)
    options = {key: config.optimizer[key] for key in ("b1", "b2", "eps", "weight_decay", "clip_norm")}
    optimizer = make_optimizer(schedule, **options)
    passes = {"chunk_size": config.loss_chunk_size, "microbatches": config.microbatches}
    try:
        init, abstract = make_init(model, optimizer, mesh)
        eval_step = make_eval_step(model, abstract, mesh, **passes)
        jax.eval_shape(eval_step, abstract.params, abstract_batch(config.batch_size, config.length))
    except ValueError as error:
        # Tracing is where the library says that a form or an implementation cannot run this model.
        raise UserError(one_line(error)) from error
    trained = choose_layer_loop(model, mesh)
    options = compiler_options(trained, mesh)
    train_step = make_train_step(trained, optimizer, schedule, abstract, mesh, **passes, compiler_options=options)
    begin = make_begin(optimizer, abstract)
    return Run(config, workdir, task, model, abstract, init, begin, train_step, eval_step, sharding, rows)


def make_workdir(run: Run) -> None:
    """Makes the working directory this run's, or checks that it is. Raises UserError where it is not."""
    with writing(run.workdir):
        claim(run.workdir, run.config, run.task.identity)
        if run.task.tokenizer is not None:
            keep_tokenizer(run.config.data.tokenizer, run.workdir)


def train(
    run: Run,
    state: TrainState,
    position: dict[str, Any] | None,
    checkpoints: Checkpoints,
    interruption: Interruption,
    console: Console,
) -> TrainState:
    """Makes the steps that are left after `state`, and returns the last state; `position` is the data's, if resumed.

    Where `interruption` is requested, the last state is that of the step under way, saved.
    """
    config = run.config
    start = int(state.step)
    with ExitStack() as stack:
        batches = training_batches(run.task.train, config.batch_size, config.seed, *run.rows)
        stack.callback(batches.close)
        if position is not None:
            batches.set_state(position)
        is_first = jax.process_index() == 0
        trackers = open_trackers(config, run.workdir, start, stack) if is_first else []
        traced = config.profile.start if is_first else None
        profiler = ProfilerWindow(traced, config.profile.steps, run.workdir / "profile")
        stack.callback(profiler.close)
        display = stack.enter_context(ProgressDisplay(console, start, config.steps))

        batch = run.place(next(batches))
        train_step = run.train_step.lower(state, batch).compile()
        meter, best, logged = run.make_meter(), on_first(lambda: checkpoints.best_loss), start
        meter.training.resume()
        for step in range(start + 1, config.steps + 1):
            if step > start + 1:
                with meter.data.running():
                    batch = run.place(next(batches))
                # Waiting for the step before keeps the bar honest, and the device is never more than one ahead.
                jax.block_until_ready(metrics)
                check_skipped(state, metrics, config.skip_limit)
            profiler.before(step)
            state, metrics = train_step(state, batch)
            display.advance(step)
            log, evaluates, saves = (
                step == config.steps or step % every == 0
                for every in (config.log_every, config.eval_every, config.checkpoint_every)
            )
            stops = interruption.agreed()
            if not (log or evaluates or saves or stops):
                continue
            record: dict[str, Any] = {"step": step}
            if log:
                record |= {f"train/{key}": value.item() for key, value in metrics.items() if key != "skipped_in_a_row"}
                record |= meter.lap(step - logged)
                logged = step
            meter.training.pause()
            if evaluates:
                record |= run.evaluate(state.params)
                if record["eval/loss"] < best:
                    # The best is saved when it is met, also between the steps that are saved anyway.
                    best, saves = record["eval/loss"], True
            if log or evaluates:
                record = only_finite(record)
                for tracker in trackers:
                    tracker.write(record)
                display.report(record)
            if saves or stops:
                checkpoints.save(state, batches.get_state(), record.get("eval/loss"))
            if stops:
                break
            meter.training.resume()
        check_skipped(state, metrics, config.skip_limit)
    return state


def check_skipped(state: TrainState, metrics: dict[str, jax.Array], limit: int) -> None:
    """Raises UserError with what is known where the last `limit` steps were all skipped; `state` is after them."""
    in_a_row = int(metrics["skipped_in_a_row"])
    if in_a_row < limit:
        return
    step, damaged = int(state.step), sum(int(jnp.sum(~jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))
    shown = {"loss": "loss", "gradient norm": "grad_norm", "learning rate": "learning_rate"}
    figures = ", ".join(f"{name} {metrics[key].item():.6g}" for name, key in shown.items())
    raise UserError(
        f"steps {step - in_a_row + 1} to {step} were skipped: their loss or gradient is not finite; at step {step} "
        f"{figures}; {damaged} parameters are not finite, {int(state.skipped)} steps were skipped in all; lower "
        "optimizer.learning_rate or set optimizer.clip_norm, and look at the data of these steps"
    )


def finish(run: Run, state: TrainState, console: Console) -> None:
    """Draws the curve and the sample of a run that has made its last step, and prints its held-out figures."""
    step = int(state.step)
    sample = sample_text(run.model, state.params, run.task, run.config.sample, run.config.seed)
    figures = on_first(lambda: write_results(run, step, sample))
    console.out(sample, highlight=False)
    figures = only_finite(run.evaluate(state.params)) if figures is None else figures
    console.out(f"step {step}: {held_out_figures(figures)}", highlight=False)


def write_results(run: Run, step: int, sample: str) -> dict[str, Any] | None:
    """Writes the curve and the sample; returns the record of an evaluation at `step`, if there is one."""
    name = f"{run.config.name}-{run.config.size} ({run.config.variant})"
    records = read_metrics(run.workdir / "metrics.jsonl")
    with writing(run.workdir):
        plot_runs({name: records}, run.workdir / "curve.png")
        replace(run.workdir / "sample.txt", sample)
    return next((record for record in records if record["step"] == step and "eval/loss" in record), None)
