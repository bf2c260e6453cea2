"""Compiles every kernel program for an H100, without a GPU: `python benchmarks/compile_kernels.py --only forward`.

Prints a line per kernel: registers, spills, shared memory, and the HGMMA instructions of its code if JAX finds
nvdisasm. The exit status is 1 if a kernel spills, if ptxas warns of serialised products or ignored register limits, if
ptx_lint.py or, where there is nvdisasm, sass_lint.py finds something, or if a program does not compile; 2 if nothing
can be compiled here. It needs JAX's CUDA plugin and ptxas: `pip install "jax[cuda13]"` brings both.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import ptx_lint
import sass_lint

# What XLA has to know of an H100 SXM. An H200 is the same but for its memory.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 1 patch: 1 }
"""
HARMLESS = {"C7519"}  # "warpgroup.arrive is injected": no product is serialised by it
SHOWN_PROBLEMS, SHOWN_FRAMES = 4, 5


@dataclasses.dataclass(frozen=True)
class Report:
    """A kernel. spill_bytes: stored and loaded. shared_bytes: barriers included. seconds: of its whole program."""

    program: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    hgmma: int | None
    seconds: float
    problems: list[str]

    def __str__(self):
        hgmma = "" if self.hgmma is None else f"{self.hgmma} HGMMA, "
        line = f"{self.program} {self.kernel}: {self.registers} registers, {self.spill_bytes} bytes spilled, "
        line += f"{self.shared_bytes} bytes of shared memory, {hgmma}{self.seconds:.1f} s"
        more = len(self.problems) - SHOWN_PROBLEMS
        return "\n    ".join([line, *self.problems[:SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])


def read_report(program: str, ptx: Path, seconds: float) -> Report:
    """The report of a kernel, from its PTX and what Mosaic GPU has written beside it."""
    log, passes = ptx.with_suffix(".ptxas").read_text(), ptx.with_suffix(".mlir-passes.log").read_text()
    sass = "".join(path.read_text() for path in ptx.parent.glob(f"{ptx.stem}.sass*"))
    spills = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    spills = sum(int(stores) + int(loads) for stores, loads in spills)
    problems = [f"spills {spills} bytes"] if spills else []
    problems += [f"{code}: {text}" for code, text in re.findall(r"\((C75\d\d)\)\s*(.*)", log) if code not in HARMLESS]
    problems += [f"PTX line {at}: {register} {text}" for at, register, text in ptx_lint.lint(ptx.read_text())]
    touched = sass_lint.lint(sass) if sass else []
    problems += [f"SASS line {at}: {register} {text}" for at, register, text in touched]
    return Report(
        program=program,
        kernel=ptx.stem.rpartition("_")[0],
        registers=max(int(count) for count in re.findall(r"Used (\d+) registers", log)),
        spill_bytes=spills,
        shared_bytes=int(re.search(r"dynamic_shared_memory_size %c(\d+)", passes)[1]),
        hgmma=sass.count("HGMMA") if sass else None,
        seconds=round(seconds, 3),
        problems=problems,
    )


@contextlib.contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    """Has standard error, that of the compilers included, written to a file: every kernel has them miss nvdisasm."""
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def compile_for_target(function: Callable, arguments: Sequence) -> None:
    """Compiles function(*arguments), which have a shape and a dtype, for one GPU like TARGET."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments]
    jax.jit(function, out_shardings=sharding).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def compile_program(name: str, function: Callable, arguments: Sequence, workdir: Path) -> list[Report]:
    """The reports of a program's kernels, which are dumped in workdir, an empty folder.

    From JAX 0.12 on a kernel that this process has compiled before is not compiled again, nor is it reported again.
    """
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(workdir)  # looked up at each compilation
    start = time.perf_counter()
    with stderr_in(workdir / "stderr.txt"):
        compile_for_target(function, arguments)
    seconds = time.perf_counter() - start
    if not any(workdir.glob("*.resources.txt")):
        raise ValueError(f"{name} has no Mosaic GPU kernel: does it ask for another implementation?")
    kernels = sorted(workdir.glob("*.ptx"), key=lambda ptx: int(ptx.stem.rpartition("_")[2]))
    return [read_report(name, ptx, seconds) for ptx in kernels]


def compile_all(programs: Sequence, dump: Path | None) -> tuple[list[Report], list[str]]:
    """The reports of the programs, printed on the way, and the names of those that fail."""
    reports, failed = [], []
    for program in programs:
        with tempfile.TemporaryDirectory() as temporary:
            folder = dump / re.sub(r"[^\w.-]+", "_", program.name) if dump else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                found = compile_program(program.name, program.function, program.arguments, folder)
                lines = found or [f"{program.name}: only kernels of programs before it"]
            except Exception:  # whatever is wrong with this one, the others are worth compiling
                traceback.print_exc(limit=-SHOWN_FRAMES)
                found, lines = [], [f"{program.name}: fails"]
                failed.append(program.name)
        print(*lines, sep="\n", flush=True)
        reports += found
    return reports, failed


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and the reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only programs with this in their name")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="keep PTX, ptxas' log and the rest in this new folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there too, with every problem")
    parser.add_argument(
        "--programs",
        default="pallas_kernels.quadratic.programs",
        metavar="MODULE",
        help="whose programs() yields objects with a name, a function and its arguments (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.dump and options.dump.exists() and (not options.dump.is_dir() or any(options.dump.iterdir())):
        parser.error(f"--dump {options.dump}: expected a new folder, or an empty one")
    return options


def main(arguments: Sequence[str]) -> int:
    """Compiles, prints and writes. The exit status is as the module says."""
    options = parse(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is to run; before JAX is imported for the first time
    try:
        with stderr_in(Path(os.devnull)):
            compile_for_target(lambda x: x + 1, [np.zeros(8, np.float32)])
    except (NotImplementedError, RuntimeError) as error:
        reason = re.split(r"\.\s", str(error))[0]
        print(f'cannot compile for an H100 here: {reason}; pip install "jax[cuda13]" brings what it takes')
        return 2
    programs = list(importlib.import_module(options.programs).programs())
    chosen = [program for program in programs if options.only in program.name]
    if not chosen:
        print(f"--only {options.only}: expected a part of {', '.join(program.name for program in programs)}")
        return 2
    reports, failed = compile_all(chosen, options.dump)
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        report = {"versions": versions, "failed": failed, "kernels": [dataclasses.asdict(r) for r in reports]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(failed) or any(report.problems for report in reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
