"""Tokens per second, memory and loss curve of training, XLA against the kernels: `python benchmarks/train_step.py`.

Every variant is trained by every implementation as `train.main` does it: the same initial parameters, batches,
optimiser and step. `--implementations cudnn` adds the variant softmax by cuDNN, which does not keep apart the documents
in a row. `--peers torch` adds a compiled PyTorch transformer of the same size (torch_peer.py), where PyTorch is
installed. A run has a process of its own, so that its peak of device memory is its own. Prints a Markdown table; writes
OUT.json, which has the loss of every step. `--parts 3` also says where the time of a step goes, from a trace of three
more; with XLA_FLAGS=--xla_gpu_enable_command_buffer= every kernel has a name.

With `--turns 3` the runs make a third of their steps each in turn, three times: all are on the device together, which
must have room for them, and a run's time is the median of its turns'. `--setting NAME KEY=VALUE ...`, given again and
again, has every run with each of them set: keys of the configuration, options of XLA (xla_...), and `code`, another
checkout of this repository. MFU is by the formula of train/observe/flops.py. `--override mesh.data=2` trains on two
GPUs: tokens/s are those of all, TFLOP/s, MFU and memory those of one; CUDA_VISIBLE_DEVICES says which GPUs there are.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import clone  # noqa: F401
import cudnn_softmax
import step_row
from step_row import Row, Task
from step_runs import Runs
from turns import Program

from train.observe.flops import PEAK_FLOPS
from twomamba_jax.ops.dispatch import IMPLEMENTATIONS

SHOWN_STEPS = (1, 10, 50, 100, 200)
GIB = 2**30
CODE = "code="
TORCH = "torch"
TORCH_MODES = ("default", "max-autotune-no-cudagraphs")  # of torch.compile
# Together on one device, no run may take most of its memory for itself.
TOGETHER = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


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
    if options.setting:
        rows = [setting_of(row, *setting) for row in rows for setting in options.setting]
    if TORCH in options.peers:
        shape = options.batch, options.length
        rows += [Row("transformer", TORCH, *shape, setting=mode) for mode in options.torch_modes]
    return rows


def setting_of(row: Row, name: str, *settings: str) -> Row:
    """The row with a setting of the command line."""
    code = [setting.removeprefix(CODE) for setting in settings if setting.startswith(CODE)]
    rest = tuple(setting for setting in settings if not setting.startswith(CODE))
    return dataclasses.replace(row, setting=name, set=rest, code=code[-1] if code else "")


def task_of(options: argparse.Namespace) -> Task:
    """What all rows have in common; the last turns have a step less where `turns` does not divide the steps."""
    turns = tuple((options.steps + n) // options.turns for n in reversed(range(options.turns)))
    return Task(options.config, tuple(options.override), tuple(options.remat), turns, options.parts)


def program_of(row: Row, task: Task, environment: Mapping[str, str] = MappingProxyType({})) -> Program:
    """The process of a row, with `environment` besides this one's own. Raises UserError."""
    here, environment = Path(__file__).parent, (TOGETHER if len(task.turns) > 1 else {}) | dict(environment)
    if row.implementation == TORCH:
        config = step_row.config_of(dataclasses.replace(row, variant="softmax", implementation="xla"), task)
        arguments = dataclasses.asdict(row), config.model.to_dict(), config.optimizer.to_dict(), task.turns
        return Program([sys.executable, str(here / "torch_peer.py"), json.dumps(arguments)], environment)
    if row.code:
        others = os.environ.get("PYTHONPATH")  # where the packages may be that both need
        environment = environment | {"PYTHONPATH": os.pathsep.join([row.code, *([others] if others else [])])}
    arguments = json.dumps([dataclasses.asdict(row), dataclasses.asdict(task)])
    return Program([sys.executable, str(here / "step_row.py"), arguments], environment)


def run_all(rows: Sequence[Row], task: Task) -> list[Row]:
    """The rows with their figures: one after the other, or by turns where there are several."""
    starters = [functools.partial(program_of, row, task) for row in rows]
    runs, order = Runs(rows, starters), range(len(rows))
    groups = [order] if len(task.turns) > 1 else [[index] for index in order]
    for group in groups:
        for index in group:
            runs.start(index)
        for _ in range(1 + len(task.turns)):
            for index in group:
                runs.turn(index)
        for index in group:
            runs.stop(index)
    return runs.rows


def records_of(rows: list[Row]) -> list[dict]:
    """The rows, with the speed over XLA's and the peer's, and the largest difference from the losses of XLA's run."""
    records = []
    plain = {row.variant: row for row in rows if row.implementation == "xla" and row.losses and not row.perturbation}
    peers = [row.tokens_per_second for row in rows if row.implementation == TORCH and row.losses]
    for row in rows:
        record, xla = dataclasses.asdict(row), plain.get(row.variant)
        if row.losses:
            speed = row.tokens_per_second
            tflops = speed * row.flops_per_token / 1e12 / row.devices
            record |= {"milliseconds": row.milliseconds, "tokens_per_second": speed, "tflops": tflops}
            if row.device in PEAK_FLOPS:
                record |= {"mfu": 1e12 * tflops / PEAK_FLOPS[row.device]}
            if xla:
                differences = [abs(loss - other) for loss, other in zip(row.losses, xla.losses)]
                over = {"speed_over_xla": speed / xla.tokens_per_second}
                record |= over | {"largest_loss_difference": max(differences)}
            if peers:
                record |= {"speed_over_torch": speed / max(peers)}
        records.append(record)
    return records


def implementation_of(record: dict) -> str:
    """With the perturbation and the setting, if there are any."""
    perturbation = f" (1 + {record['perturbation']:g})" if record["perturbation"] else ""
    return record["implementation"] + perturbation + (f", {record['setting']}" if record["setting"] else "")


def table(records: list[dict], steps: int) -> str:
    """Markdown, with the loss at some steps and at the last; with what is over PyTorch's where there is such a peer."""
    shown = [*(step for step in SHOWN_STEPS if step < steps), steps]
    has_peer = any("speed_over_torch" in r for r in records)
    header = ["variant", "implementation", "remat", "B", "T", *(f"loss at {step}" for step in shown), "off XLA's"]
    header += ["ms a step", "tokens/s", "over XLA", *(["over PyTorch"] if has_peer else []), "TFLOP/s", "MFU"]
    header += ["peak, GiB", "scratch, GiB", "compile, s"]
    lines = [f"| {' | '.join(header)} |", f"|---|---|---|{'---:|' * (len(header) - 3)}"]
    for r in records:
        cells = [r["variant"], implementation_of(r), "" if r["note"] else r["remat"], str(r["batch"]), str(r["length"])]
        if r["note"]:
            cells += [r["note"], *[""] * (len(header) - len(cells) - 1)]
        else:
            of_peer = r["implementation"] == TORCH  # whose tokens are others
            cells += ["" if of_peer else f"{r['losses'][step - 1]:.4f}" for step in shown]
            figures = [(r.get("largest_loss_difference"), ".4f"), (r["milliseconds"], ".1f")]
            figures += [(r["tokens_per_second"], ",.0f"), (r.get("speed_over_xla"), ".2f")]
            figures += [(r.get("speed_over_torch"), ".3f")] if has_peer else []
            figures += [(r["tflops"], ".0f"), (r.get("mfu"), ".3f")]
            figures += [(r[key] and r[key] / GIB, ".2f") for key in ("peak_bytes", "temporary_bytes")]
            figures += [(r["compile_seconds"], ".0f")]
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
    add("--implementations", nargs="+", choices=known, default=["xla", "mosaic_gpu"])
    add("--batch", type=int, default=8, help="rows of a batch")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--steps", type=int, default=200)
    remat = "implementations that recompute each block's activations; XLA's T^2 weights of every layer take much memory"
    add("--remat", nargs="*", choices=IMPLEMENTATIONS, default=["xla"], help=remat)
    help_ = "XLA again from initial parameters times 1 + EPS: how far rounding alone takes the losses of two runs apart"
    add("--perturbations", type=float, nargs="*", default=[], metavar="EPS", help=help_)
    help_ = "steps to trace after the others, for the time of a step by part of the model; 0: none"
    add("--parts", type=int, default=0, metavar="STEPS", help=help_)
    add("--turns", type=int, default=1, help="in how many turns each run makes its steps, all on the device together")
    help_ = "every run with this set besides: keys of the configuration, xla_... of the compiler, code=CHECKOUT"
    add("--setting", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help=help_)
    add("--peers", nargs="*", choices=[TORCH], default=[], help="what a user would pick instead, of the same size")
    add("--torch-modes", nargs="+", choices=TORCH_MODES, default=["default"], help="of torch.compile, a run each")
    add("--override", nargs="*", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE of train.main")
    add("--out", type=Path, default=Path("docs/figures/train_step"), help="writes OUT.json")
    options = parser.parse_args(arguments)
    check(parser, options)
    if TORCH in options.peers and importlib.util.find_spec(TORCH) is None:
        parser.error("--peers torch: PyTorch is not installed here; python -m pip install torch")
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program where settings, turns or the place of the report are wrong; makes the folder of the report."""
    given = [("--override", setting) for setting in options.override]
    given += [("--setting", setting) for _, *settings in options.setting for setting in settings]
    for option, setting in given:
        if "=" not in setting:
            parser.error(f"{option} {setting}: expected KEY=VALUE")
    if not 1 <= options.turns <= max(options.steps, 1):
        parser.error(f"--turns {options.turns}: expected from 1 to --steps {options.steps}")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")


def main(arguments: Sequence[str]) -> int:
    """Trains, prints and writes. The exit status is 1 if a run could not be made."""
    options = parse(arguments)
    rows = run_all(rows_of(options), task_of(options))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions |= {row.implementation: row.version for row in rows if row.version}
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
