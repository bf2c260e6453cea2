"""One row of `benchmarks/train_step.py`: a model trained in a process of its own, as `train.main` does it."""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import cudnn_softmax
import flax.linen as nn
import jax
from ml_collections import ConfigDict
from step_parts import traced
from turns import serve

from train.configuration import apply_overrides, load_config, validate
from train.data.rows import abstract_batch, training_batches
from train.errors import UserError, one_line
from train.loop import build
from train.observe.flops import training_flops_per_token
from train.processes import join
from train.sharding import RULES, make_mesh

XLA = "xla_"  # how the names of the compiler's options begin
WARM_UP_STEPS = 10  # not in the median; half of a shorter run


@dataclasses.dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
      setting: the name of what is set besides; of a peer, how it is compiled.
      set: KEY=VALUE, of the configuration or of XLA.
      code: the checkout that is run; empty: this one.
      perturbation: the initial parameters are times 1 + this.
      peak_bytes, temporary_bytes: of one device, the latter of the compiled step.
      parts: milliseconds of each part of the model in a step.
      version: of a peer.
      note: why there are no figures.
    """

    variant: str
    implementation: str
    batch: int
    length: int
    setting: str = ""
    set: tuple[str, ...] = ()
    code: str = ""
    perturbation: float = 0.0
    remat: str = ""
    device: str = ""
    devices: int = 1  # of the mesh
    parameters: int = 0
    losses: tuple[float, ...] = ()  # of every step
    milliseconds_by_turn: tuple[float, ...] = ()  # a step, the median of each turn's
    flops_per_token: float | None = None
    peak_bytes: int | None = None  # of device memory, where the device tells
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    version: str = ""
    note: str = ""

    @property
    def milliseconds(self) -> float | None:
        """A step, the median of the turns'."""
        return statistics.median(self.milliseconds_by_turn) if self.milliseconds_by_turn else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of a step."""
        return self.milliseconds and 1e3 * self.batch * self.length / self.milliseconds


@dataclasses.dataclass(frozen=True)
class Task:
    """What all rows have in common: options of `benchmarks/train_step.py`; `turns` has the number of steps of each."""

    config: str
    override: tuple[str, ...]
    remat: tuple[str, ...]
    turns: tuple[int, ...]
    parts: int = 0


def config_of(row: Row, task: Task) -> ConfigDict:
    """The configuration of a run. Raises UserError."""
    config = load_config(task.config)
    changes = {"variant": row.variant, "steps": sum(task.turns), "batch_size": row.batch, "length": row.length}
    if row.implementation != cudnn_softmax.NAME:
        changes["execution.implementation"] = row.implementation
    if row.implementation in task.remat:
        changes["execution.remat"] = "full"
    given = [setting.split("=", 1) for setting in (*task.override, *row.set) if not setting.startswith(XLA)]
    apply_overrides(config, [*((key, str(value)) for key, value in changes.items()), *given])
    validate(config)
    return config


def compiler_options(row: Row) -> dict[str, Any] | None:
    """Those of XLA that are set; None if none is: then the step is compiled as the program compiles it."""
    options = dict(setting.split("=", 1) for setting in row.set if setting.startswith(XLA))
    return {name: option_value(text) for name, text in options.items()} or None


def option_value(text: str) -> bool | int | str:
    """The value of an option of XLA."""
    return {"true": True, "false": False}.get(text.lower(), int(text) if text.isdigit() else text)


def train(row: Row, task: Task) -> Iterator[Row]:
    """The row when its step is lowered, when it is compiled, and with the figures so far after each turn.

    With a note instead from where it cannot go on.
    """
    try:
        config = config_of(row, task)
        join(config.distributed)
        mesh = make_mesh(config.mesh)
        by_cudnn = row.implementation == cudnn_softmax.NAME
        peer = cudnn_softmax.softmax_by_cudnn() if by_cudnn else contextlib.nullcontext()
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), peer:
            run = build(config, Path(), mesh)
            lowered = run.train_step.lower(run.abstract, abstract_batch(config.batch_size, config.length))
        yield row
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            start = time.perf_counter()
            step = lowered.compile(compiler_options(row))
            row = dataclasses.replace(row, compile_seconds=time.perf_counter() - start)
            state = run.init(jax.random.key(config.seed))
        if row.perturbation:
            state = state._replace(params=jax.tree.map(lambda x: x * (1 + row.perturbation), state.params))
        batches = training_batches(run.task.train, config.batch_size, config.seed, *run.rows)
        batch = run.place(next(batches))

        def advance() -> float:
            nonlocal state, batch
            state, metrics = step(state, batch)
            batch = run.place(next(batches))
            jax.block_until_ready((state, metrics))
            return float(metrics["loss"])

        yield row
        losses, medians = [], []
        for count in task.turns:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                losses.append(advance())
                times.append(time.perf_counter() - start)
            warm_up = 0 if medians else min(WARM_UP_STEPS, count // 2)
            medians.append(1e3 * statistics.median(times[warm_up:]))
            device = jax.local_devices()[0]
            row = dataclasses.replace(
                row,
                remat=config.execution.remat,
                device=device.device_kind,
                devices=mesh.size,
                parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                losses=tuple(losses),
                milliseconds_by_turn=tuple(medians),
                flops_per_token=training_flops_per_token(run.model.config, state.params, config.length),
                peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
                temporary_bytes=step.memory_analysis().temp_size_in_bytes,
            )
            if task.parts and len(medians) == len(task.turns):
                row = dataclasses.replace(row, parts=traced(advance, task.parts, step.as_text()))
            yield row
        batches.close()
    except UserError as error:
        note = one_line(error)
    except Exception as error:  # Whatever a compiler or a device raises: the other runs are wanted all the same.
        note = f"{type(error).__name__}: {one_line(error, 160)}"
    else:
        return
    while True:
        yield dataclasses.replace(row, note=note)


def as_row(record: dict[str, Any]) -> Row:
    """A row from JSON."""
    return Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})


def main(argument: str) -> None:
    """Serves a row and its task, given as JSON."""
    row, task = json.loads(argument)
    task = Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in task.items()})
    serve(map(dataclasses.asdict, train(as_row(row), task)))


if __name__ == "__main__":
    main(sys.argv[1])
