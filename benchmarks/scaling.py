"""Tokens per second of several GPUs over those of as many alone: `python benchmarks/scaling.py --meshes data=2 fsdp=2`.

Every variant is trained as benchmarks/train_step.py trains it, on one GPU and on every mesh: `data=4`, or
`fsdp=2,tensor=2`; on those of `--processes` with a process for each GPU, as several hosts would. A GPU has --batch
rows, so that a mesh of n has n times as many; the GPUs of an axis `sequence` share the rows, and what is divided by is
one GPU with the same row. All runs are on the GPUs together, which must have room for them, and take their turns.
`--setting NAME KEY=VALUE ...` has every mesh with each of them set: keys of the configuration, options of XLA
(xla_...); NAME alone is without. With a compilation cache (JAX_COMPILATION_CACHE_DIR) meshes take over what XLA has
timed of its kernels for one GPU; without one they all time them together.

Prints a Markdown table and writes OUT.json. `--parts 3` says where the time of a step of the first GPU goes, and how
long it waits for others: of collectives what no other work hides. CUDA_VISIBLE_DEVICES says which GPUs there are.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import select
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import clone  # noqa: F401
from step_row import Row, Task
from step_runs import Runs
from train_step import GIB, TOGETHER, check, program_of, setting_of, table_of_parts, task_of
from turns import Program

from train.errors import UserError
from train.sharding import MESH_AXES
from twomamba_jax.ops.dispatch import IMPLEMENTATIONS

ALONE = "1"  # the name of the mesh of one GPU


class Together:
    """The processes of one run, which all take part in every step; what the first finds is the run's."""

    def __init__(self, programs: Sequence[Program]):
        """`programs` are those of the processes, by their numbers."""
        self._programs = programs

    def ask(self) -> None:
        """As each program's."""
        for program in self._programs:
            program.ask()

    def answer(self) -> dict:
        """The first one's, when all have theirs, or that of one that cannot go on: the others would wait for it."""
        answers = {}
        while waiting := [program for program in self._programs if program not in answers]:
            for program in select.select(waiting, [], [])[0]:
                answers[program] = program.answer()
                if answers[program]["note"]:
                    return answers[program]
        return answers[self._programs[0]]

    def close(self) -> None:
        """Ends all: they wait for one another at their end."""
        for program in self._programs:
            program.dismiss()
        for program in self._programs:
            program.close()


def sizes_of(mesh: str) -> dict[str, int]:
    """Of a mesh's axes by its name on the command line. Raises ValueError."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in mesh.split(",") if mesh != ALONE else ():
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{mesh!r}: expected AXIS=SIZE,... of the axes {', '.join(MESH_AXES)}, such as data=4")
        sizes[axis] = int(size)
    return sizes


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of the table: a run on a mesh.

    Attributes:
      processes: how many share its GPUs equally.
      row: the run.
    """

    mesh: str
    processes: int
    row: Row

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(sizes_of(self.mesh).values())


def points_of(options: argparse.Namespace) -> list[Point]:
    """Of each variant the run on one GPU, then those on meshes."""
    meshes = [
        (ALONE, False),
        *((mesh, False) for mesh in options.meshes),
        *((mesh, True) for mesh in options.processes),
    ]
    points = []
    for variant in options.variants:
        for mesh, apart in meshes:
            sizes = sizes_of(mesh)
            rows = options.batch * math.prod(size for axis, size in sizes.items() if axis != "sequence")
            row = Row(variant, options.implementation, rows, options.length)
            axes = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
            processes = math.prod(sizes.values()) if apart else 1
            for name, *settings in options.setting if mesh != ALONE and options.setting else [[""]]:
                names = mesh, f"{processes} processes" if apart else "", name
                row_of_setting = setting_of(row, ", ".join(filter(None, names)), *axes, *settings)
                points.append(Point(mesh, processes, row_of_setting))
    return points


def programs_of(point: Point, task: Task) -> Together:
    """What makes a run: a process that sees its GPUs alone, or several. Raises UserError."""
    each = point.devices // point.processes
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(number) for number in range(point.devices)] if known is None else [x for x in known.split(",") if x]
    if 0 < len(gpus) < point.devices:
        raise UserError(f"{point.mesh} needs {point.devices} GPUs, and CUDA_VISIBLE_DEVICES={known} names {len(gpus)}")
    rows = [point.row]
    if point.processes > 1:
        together = (
            f"distributed.coordinator_address=localhost:{free_port()}",
            f"distributed.num_processes={point.processes}",
        )
        rows = [
            dataclasses.replace(point.row, set=(*point.row.set, *together, f"distributed.process_id={number}"))
            for number in range(point.processes)
        ]
    programs = []
    for number, row in enumerate(rows):
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * each : (number + 1) * each])}
        programs.append(program_of(row, task, TOGETHER | visible | {"JAX_NUM_CPU_DEVICES": str(each)}))
    return Together(programs)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def run_all(points: Sequence[Point], task: Task) -> list[Point]:
    """The points with their figures: compiled at the same time, then by turns."""
    runs = Runs([point.row for point in points], [functools.partial(programs_of, point, task) for point in points])
    order = range(len(points))
    for index in order:
        runs.start(index)
    # First the one from which the others can take what XLA measures.
    runs.turn(*(index for index in order if points[index].mesh == ALONE))
    runs.turn(*(index for index in order if points[index].mesh != ALONE))
    for _ in task.turns:
        for index in order:
            runs.turn(index)
    for index in order:
        runs.stop(index)
    return [dataclasses.replace(point, row=row) for point, row in zip(points, runs.rows, strict=True)]


def records_of(points: Sequence[Point]) -> list[dict]:
    """The rows, with tokens/s and these over those of as many GPUs alone."""
    alone = {point.row.variant: point.row.tokens_per_second for point in points if point.mesh == ALONE}
    records = []
    for point in points:
        row = point.row
        record = dataclasses.asdict(row) | {"mesh": point.mesh, "processes": point.processes}
        if row.losses:
            record |= {"milliseconds": row.milliseconds, "tokens_per_second": row.tokens_per_second}
            if alone[row.variant]:
                record["of_alone"] = row.tokens_per_second / point.devices / alone[row.variant]
        records.append(record | {"devices": point.devices})
    return records


def table(records: Sequence[dict]) -> str:
    """Markdown."""
    header = ["variant", "mesh", "GPUs", "B", "T", "loss", "ms a step", "tokens/s", "of GPUs alone"]
    header += ["peak of a GPU, GiB", "compile, s"]
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---:|' * (len(header) - 2)}"]
    for r in records:
        cells = [r["variant"], r["setting"], str(r["devices"]), str(r["batch"]), str(r["length"])]
        if r["note"]:
            cells += [r["note"], *[""] * (len(header) - len(cells) - 1)]
        else:
            figures = [(r["losses"][-1], ".4f"), (r["milliseconds"], ".1f"), (r["tokens_per_second"], ",.0f")]
            figures += [(r.get("of_alone"), ".3f"), (r["peak_bytes"] and r["peak_bytes"] / GIB, ".2f")]
            figures += [(r["compile_seconds"], ".0f")]
            cells += ["" if value is None else format(value, form) for value, form in figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs/2mamba.py:small", metavar="PATH[:SIZE]", help="of every run but for its variant")
    add("--variants", nargs="+", default=["2mamba"], metavar="NAME")
    add("--implementation", choices=IMPLEMENTATIONS, default="mosaic_gpu")
    add("--meshes", nargs="*", default=["data=2", "fsdp=2"], metavar="AXIS=SIZE[,...]")
    add("--processes", nargs="*", default=[], metavar="AXIS=SIZE[,...]", help="meshes with a process for each GPU")
    add("--batch", type=int, default=8, help="rows of a GPU")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--steps", type=int, default=24)
    add("--turns", type=int, default=3, help="in how many turns each run makes its steps")
    add("--parts", type=int, default=0, metavar="STEPS", help="to trace after the others; 0: none")
    help_ = "every mesh with this set besides: keys of the configuration, xla_... of the compiler"
    add("--setting", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help=help_)
    add("--override", nargs="*", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE of train.main")
    add("--out", type=Path, default=Path("docs/figures/scaling"), help="writes OUT.json")
    options = parser.parse_args(arguments)
    for option in ("meshes", "processes"):
        for mesh in vars(options)[option]:
            try:
                sizes_of(mesh)
            except ValueError as error:
                parser.error(f"--{option} {error}")
    for setting in (*options.override, *(setting for _, *settings in options.setting for setting in settings)):
        if setting.startswith("mesh."):
            parser.error(f"{setting}: meshes are given by --meshes")
    check(parser, options)
    options.remat = []  # of task_of: as the configuration has it
    return options


def main(arguments: Sequence[str]) -> int:
    """Trains, prints and writes. The exit status is 1 if a run could not be made."""
    options = parse(arguments)
    points = run_all(points_of(options), task_of(options))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    records = records_of(points)
    command = shlex.join(["python", "benchmarks/scaling.py", *arguments])
    Path(f"{options.out}.json").write_text(
        json.dumps({"command": command, "versions": versions, "rows": records}, indent=1) + "\n"
    )
    devices = ", ".join(dict.fromkeys(point.row.device for point in points if point.row.device))
    print(f"{devices}; {', '.join(map(' '.join, versions.items()))}; {options.config}\n")
    print(table(records))
    if options.parts:
        print(f"\n{table_of_parts(records)}")
    return int(any(point.row.note for point in points))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
