"""Tokens per second, memory and loss curve of training, XLA against the kernels: `python benchmarks/train_step.py`.

Every variant is trained by every implementation as `train.main` does it: the same initial parameters, batches,
optimiser and step. `--implementations cudnn` adds the variant softmax by cuDNN, which does not keep apart the documents
in a row. A run has a process of its own, so that its peak of device memory is its own. Prints a Markdown table; writes
OUT.json, which has the loss of every step. `--parts 3` also says where the time of a step goes, from a trace of three
more; with XLA_FLAGS=--xla_gpu_enable_command_buffer= every kernel has a name.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import cudnn_softmax
import flax.linen as nn
import jax
from ml_collections import ConfigDict
from step_parts import traced

from train.configuration import apply_overrides, load_config, validate
from train.data.rows import training_batches
from train.errors import UserError, one_line
from train.loop import build
from train.sharding import RULES, make_mesh
from twomamba_jax.ops.dispatch import IMPLEMENTATIONS

SHOWN_STEPS = (1, 10, 50, 100, 200)
WARM_UP_STEPS = 10  # not in the median; half of a shorter run
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
      perturbation: the initial parameters are times 1 + this.
      temporary_bytes: of the compiled step.
      parts: milliseconds of each part of the model in a step.
      note: why there are no figures.
    """

    variant: str
    implementation: str
    batch: int
    length: int
    perturbation: float = 0.0
    remat: str = "none"
    device: str = ""
    parameters: int = 0
    losses: tuple[float, ...] = ()  # of every step
    milliseconds: float | None = None  # a step, the median
    tokens_per_second: float | None = None
    peak_bytes: int | None = None  # of device memory, where the device tells
    temporary_bytes: int | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


def rows_of(options: argparse.Namespace) -> list[Row]:
    rows = [
        Row(variant, implementation, options.batch, options.length)
        for variant in options.variants
        for implementation in options.implementations
        if variant == cudnn_softmax.VARIANT or implementation != cudnn_softmax.NAME
    ]
    for size in options.perturbations:
        plain = [row for row in rows if row.implementation == "xla" and not row.perturbation]
        rows += [dataclasses.replace(row, perturbation=size) for row in plain]
    return rows


def config_of(row: Row, options: argparse.Namespace) -> ConfigDict:
    """The configuration of a run. Raises UserError."""
    config = load_config(options.config)
    changes = {"variant": row.variant, "steps": options.steps, "batch_size": row.batch, "length": row.length}
    if row.implementation != cudnn_softmax.NAME:
        changes["execution.implementation"] = row.implementation
    if row.implementation in options.remat:
        changes["execution.remat"] = "full"
    given = [setting.split("=", 1) for setting in options.override]
    apply_overrides(config, [*((key, str(value)) for key, value in changes.items()), *given])
    validate(config)
    return config


def train(row: Row, options: argparse.Namespace) -> Row:
    """The row with the figures of its run; with a note instead where it cannot be made."""
    try:
        config = config_of(row, options)
        mesh = make_mesh(config.mesh)
        by_cudnn = row.implementation == cudnn_softmax.NAME
        peer = cudnn_softmax.softmax_by_cudnn() if by_cudnn else contextlib.nullcontext()
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), peer:
            run = build(config, Path(), mesh)
            state = run.init(jax.random.key(config.seed))
            if row.perturbation:
                state = state._replace(params=jax.tree.map(lambda x: x * (1 + row.perturbation), state.params))
            batches = training_batches(run.task.train, config.batch_size, config.seed)
            batch = next(batches)
            step = run.train_step.lower(state, batch).compile()

            def advance():
                nonlocal state, batch
                state, metrics = step(state, batch)
                batch = next(batches)
                jax.block_until_ready((state, metrics))
                return float(metrics["loss"])

            losses, times = [], []
            while len(losses) < config.steps:
                start = time.perf_counter()
                losses.append(advance())
                times.append(time.perf_counter() - start)
            parts = traced(advance, options.parts, step.as_text()) if options.parts else {}
            batches.close()
    except UserError as error:
        return dataclasses.replace(row, note=one_line(error))
    except Exception as error:  # Whatever a compiler or a device raises: the other runs are wanted all the same.
        return dataclasses.replace(row, note=f"{type(error).__name__}: {one_line(error, 160)}")
    seconds, device = statistics.median(times[min(WARM_UP_STEPS, len(times) // 2) :]), jax.devices()[0]
    return dataclasses.replace(
        row,
        remat=config.execution.remat,
        device=device.device_kind,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        losses=tuple(losses),
        milliseconds=1e3 * seconds,
        tokens_per_second=config.batch_size * config.length / seconds,
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        temporary_bytes=step.memory_analysis().temp_size_in_bytes,
        parts=parts,
    )


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in a new process. Raises BrokenProcessPool where that dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def records_of(rows: list[Row]) -> list[dict]:
    """The rows, with the speed over XLA's and the largest difference from the losses of XLA's run."""
    records = []
    peers = {row.variant: row for row in rows if row.implementation == "xla" and row.losses and not row.perturbation}
    for row in rows:
        record, peer = dataclasses.asdict(row), peers.get(row.variant)
        if peer and row.losses:
            differences = [abs(loss - other) for loss, other in zip(row.losses, peer.losses)]
            speed = row.tokens_per_second / peer.tokens_per_second
            record |= {"speed_over_xla": speed, "largest_loss_difference": max(differences)}
        records.append(record)
    return records


def implementation_of(record: dict) -> str:
    """With the perturbation, if there is one."""
    return record["implementation"] + (f" (1 + {record['perturbation']:g})" if record["perturbation"] else "")


def table(records: list[dict], steps: int) -> str:
    """Markdown, with the loss at some steps and at the last."""
    shown = [*(step for step in SHOWN_STEPS if step < steps), steps]
    header = ["variant", "implementation", "remat", "B", "T", *(f"loss at {step}" for step in shown), "off XLA's"]
    header += ["ms a step", "tokens/s", "over XLA", "peak, GiB", "scratch, GiB"]
    lines = [f"| {' | '.join(header)} |", f"|---|---|---|{'---:|' * (len(header) - 3)}"]
    for r in records:
        remat = "" if r["note"] else r["remat"]
        cells = [r["variant"], implementation_of(r), remat, str(r["batch"]), str(r["length"])]
        if r["note"]:
            cells += [r["note"], *[""] * (len(header) - len(cells) - 1)]
        else:
            cells += [f"{r['losses'][step - 1]:.4f}" for step in shown]
            figures = [(r.get("largest_loss_difference"), ".4f"), (r["milliseconds"], ".1f")]
            figures += [(r["tokens_per_second"], ",.0f"), (r.get("speed_over_xla"), ".2f")]
            figures += [(r[key] and r[key] / GIB, ".2f") for key in ("peak_bytes", "temporary_bytes")]
            cells += ["" if value is None else format(value, form) for value, form in figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_parts(records: list[dict]) -> str:
    """Markdown: milliseconds of a step by part, a column for every run that was traced."""
    records = [record for record in records if record["parts"]]
    names = dict.fromkeys(name for record in records for name in record["parts"])
    lines = [f"| part | {' | '.join(f'{r["variant"]}, {implementation_of(r)}' for r in records)} |"]
    lines.append(f"|---|{'---:|' * len(records)}")
    for name in names:
        lines.append(f"| {name} | {' | '.join(f'{r["parts"].get(name, 0):.2f}' for r in records)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs/2mamba.py:small", metavar="PATH[:SIZE]", help="of every run but for its variant")
    add("--variants", nargs="+", default=["2mamba", "2mamba-e", "softmax"], metavar="NAME")
    known = (*IMPLEMENTATIONS, cudnn_softmax.NAME)
    add("--implementations", nargs="+", choices=known, default=list(IMPLEMENTATIONS))
    add("--batch", type=int, default=8, help="rows of a batch")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--steps", type=int, default=200)
    remat = "implementations that recompute each block's activations; XLA's T^2 weights of every layer take much memory"
    add("--remat", nargs="*", choices=IMPLEMENTATIONS, default=["xla"], help=remat)
    help_ = "XLA again from initial parameters times 1 + EPS: how far rounding alone takes the losses of two runs apart"
    add("--perturbations", type=float, nargs="*", default=[], metavar="EPS", help=help_)
    help_ = "steps to trace after the others, for the time of a step by part of the model; 0: none"
    add("--parts", type=int, default=0, metavar="STEPS", help=help_)
    add("--override", nargs="*", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE of train.main")
    add("--out", type=Path, default=Path("docs/figures/train_step"), help="writes OUT.json")
    options = parser.parse_args(arguments)
    for setting in options.override:
        if "=" not in setting:
            parser.error(f"--override {setting}: expected KEY=VALUE")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Trains, prints and writes. The exit status is 1 if a run could not be made."""
    options, rows = parse(arguments), []
    for row in rows_of(options):
        try:
            row = in_own_process(train, row, options)
        except BrokenProcessPool:
            row = dataclasses.replace(row, note="its process died")
        told = row.note or f"{row.tokens_per_second:,.0f} tokens/s, loss {row.losses[-1]:.4f}"
        print(f"{row.variant} {row.implementation}: {told}", file=sys.stderr)
        rows.append(row)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    command = shlex.join(["python", "benchmarks/train_step.py", *arguments])
    report = {"command": command, "versions": versions, "rows": records_of(rows)}
    Path(f"{options.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    devices = ", ".join(dict.fromkeys(row.device for row in rows if row.device))
    print(f"{devices}; {', '.join(map(' '.join, versions.items()))}; {options.config}\n")
    print(table(report["rows"], options.steps))
    if options.parts:
        print(f"\n{table_of_parts(report['rows'])}")
    return int(any(row.note for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
