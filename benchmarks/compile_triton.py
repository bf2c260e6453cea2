"""Compiles the Triton kernels for every architecture, without a GPU: `python benchmarks/compile_triton.py --only fold`.

Prints a Markdown table: registers, spills, shared and tensor memory, and the warps that a multiprocessor holds at once.
The exit status is 1 if a kernel spills, does not fit its architecture, does not compile, or if ptx_lint.py or
sass_lint.py finds a register of an asynchronous product that is touched too early; 2 if nothing can be compiled here.
It needs Triton: `pip install triton`. XLA's ptxas, which assembles the same PTX where a kernel runs, may allot
registers a little differently; Triton's is one of those that `sass_lint.py` is for.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import clone  # noqa: F401
import ptx_lint
import sass_lint

KIB = 1024


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has, by the table of compute capabilities in NVIDIA's CUDA C++ Programming Guide.

    Attributes:
      gpu: one with it.
      block_kib: KiB of shared memory that a program can have.
      multiprocessor_kib: KiB that all its programs share; each takes 1 more than it asks for.
      warps: at once.
      programs: at once.
      ptx_version: that XLA's ptxas of CUDA 13.0 reads.
    """

    gpu: str
    block_kib: int
    multiprocessor_kib: int
    warps: int
    programs: int
    ptx_version: int


ARCHITECTURES = {
    80: Architecture("A100", 163, 164, 64, 32, 87),
    86: Architecture("RTX 3090", 99, 100, 48, 16, 87),
    89: Architecture("RTX 4090, L40S", 99, 100, 48, 24, 87),
    90: Architecture("H100, H200", 227, 228, 64, 32, 87),
    100: Architecture("B200", 227, 228, 64, 32, 90),
    120: Architecture("RTX 5090", 99, 100, 48, 24, 90),
}
READS_REGISTERS = re.compile(r"wgmma\.mma_async[^;]*\}\s*,\s*\{")  # an asynchronous product's left operand
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory, where it has one
REGISTERS_OF_WARPS = 16384  # registers of each of a multiprocessor's four parts


@dataclasses.dataclass(frozen=True)
class Report:
    """A kernel on an architecture. spill_bytes: stored and loaded. resident_warps: that a multiprocessor holds."""

    kernel: str
    architecture: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    warps: int = 0
    resident_warps: int = 0
    problems: tuple[str, ...] = ()

    def __str__(self):
        cells = self.kernel, f"sm_{self.architecture}", self.registers, self.spill_bytes, self.shared_bytes
        cells += self.tensor_columns, self.warps, self.resident_warps, "; ".join(self.problems)
        return f"| {' | '.join(map(str, cells))} |"


HEADER = """\
| kernel | for | registers | spilled bytes | shared bytes | tensor columns | warps | resident warps | problems |
|---|---|---:|---:|---:|---:|---:|---:|---|"""


def ptx_of(entry: dict, architecture: int, lowered: dict | None = None) -> tuple[str, dict]:
    """PTX of an entry of `programs`, with what jax-triton takes for granted: pointers are multiples of 16 bytes.

    `lowered` has what was made of the IR that LLVM takes: it is the same for 8.0, 8.6 and 8.9 where their tiles are.
    """
    import triton._C.libtriton as libtriton
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler.compiler import ASTSource, make_backend

    kernel, constexprs = entry["kernel"], entry["constexprs"]
    types = {name: "constexpr" if name in constexprs else entry["args"][name] for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(types) if types[name].startswith("*")]
    source = ASTSource(kernel, types, constexprs, {(i,): [["tt.divisibility", 16]] for i in pointers})
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    sizes = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}
    options = backend.parse_options(sizes | {"ptx_version": ARCHITECTURES[architecture].ptx_version})
    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, codegen, backend.get_module_map(), context)
    stages, metadata = {}, {"num_warps": options.num_warps}
    backend.add_stages(stages, options, Language.TRITON)
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    lowered = {} if lowered is None else lowered
    key = architecture // 10, str(module).replace(f"cuda:{architecture}", "")
    if key not in lowered:
        for name in ("llir", "ptx"):
            module = stages[name](module, metadata)
        lowered[key] = str(module), metadata
    ptx, metadata = lowered[key]
    return re.sub(r"(?<=\.target sm_)8\d\b", str(architecture), ptx), metadata


def assemble(ptx: str, architecture: int) -> tuple[str, str | None]:
    """What ptxas says of the PTX, and the machine code as text, or None where `sass_lint.py` has nothing to look for.

    Raises:
      RuntimeError: ptxas refuses the PTX, in these words.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        ptxas, cubin = Path(get_ptxas(architecture).path), f"{source}.cubin"
        command = ptxas, "-v", f"--gpu-name={name}", source, "-o", cubin
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        if not READS_REGISTERS.search(ptx):
            return done.stderr, None
        command = ptxas.with_name("nvdisasm"), "-c", cubin
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return done.stderr, sass


def resident_programs(report: Report) -> int:
    """How many programs a multiprocessor holds at once."""
    limits = ARCHITECTURES[report.architecture]
    of_warp = -(-max(report.registers, 1) * 32 // 256) * 256
    bounds = [limits.programs, limits.warps // report.warps]
    bounds.append(4 * (REGISTERS_OF_WARPS // of_warp) // report.warps)
    bounds.append(limits.multiprocessor_kib * KIB // (report.shared_bytes + KIB))
    if report.tensor_columns:
        bounds.append(TENSOR_COLUMNS // report.tensor_columns)
    return min(bounds)


def read_report(entry: dict, architecture: int, log: str, metadata: dict) -> Report:
    """The report of a kernel, from what ptxas said."""

    def largest(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, log)), default=0)

    report = Report(
        kernel=entry["name"],
        architecture=architecture,
        registers=largest(r"Used (\d+) registers"),
        spill_bytes=largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
        shared_bytes=metadata["shared"],
        tensor_columns=metadata.get("tmem_size") or 0,
        warps=metadata["num_warps"],
    )
    limit, problems = ARCHITECTURES[architecture].block_kib * KIB, []
    if report.spill_bytes:
        problems.append(f"spills {report.spill_bytes} bytes")
    if report.shared_bytes > limit:
        problems.append(f"{report.shared_bytes} bytes of shared memory, of {limit}")
    if report.warps != entry["num_warps"]:
        problems.append(f"needs {report.warps} warps, and {entry['num_warps']} are launched")
    warps = resident_programs(report) * report.warps
    if not warps:
        problems.append("no program fits a multiprocessor")
    return dataclasses.replace(report, resident_warps=warps, problems=tuple(problems))


def compile_entry(entry: dict, architecture: int, lowered: dict | None = None) -> Report:
    """The report of one kernel on one architecture, whatever becomes of it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the compiler prints the whole PTX where it fails
            ptx, metadata = ptx_of(entry, architecture, lowered)
        log, sass = assemble(ptx, architecture)
        report = read_report(entry, architecture, log, metadata)
        findings = ("PTX", ptx_lint.lint(ptx)), ("SASS", sass_lint.lint(sass) if sass else [])
        touched = [f"{what} line {at}: {register} {text}" for what, all_ in findings for at, register, text in all_[:1]]
        return dataclasses.replace(report, problems=(*report.problems, *touched))
    except Exception as error:  # of whatever class a compiler's are
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Report(entry["name"], architecture, problems=(problem,))


def one_of_each(entries: Sequence[dict]) -> list[dict]:
    """The smallest entry of every kernel, for every architecture that any of its entries serves."""
    found = {}
    for entry in sorted(entries, key=size_of):
        for architecture in entry["arch"]:
            found.setdefault((entry["kernel"].__name__, architecture), entry | {"arch": (architecture,)})
    return list(found.values())


def size_of(entry: dict) -> tuple[int, int]:
    """Its operands, and the size of a head."""
    return sum(kind is not None for kind in entry["args"].values()), entry["constexprs"].get("DIM", 0)


def reports(entries: Sequence[dict], architectures: Sequence[int], lowered: dict | None = None) -> Iterator[Report]:
    """Of every entry, on those architectures that it serves."""
    for entry in entries:
        for architecture in (a for a in architectures if a in entry["arch"]):
            yield compile_entry(entry, architecture, lowered)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds this")
    parser.add_argument("--one_of_each", action="store_true", help="the smallest tile of each kernel")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the reports as JSON")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # which changes no code
    try:
        import triton

        from pallas_kernels.triton.programs import programs
    except ImportError as error:
        print(f"nothing can be compiled here: {error}: pip install 'twomamba-jax[triton]'", file=sys.stderr)
        return 2
    entries = [entry for entry in programs() if options.only in entry["name"]]
    entries = one_of_each(entries) if options.one_of_each else entries
    print(f"Triton {triton.__version__}\n\n{HEADER}")
    found = []
    for report in reports(entries, options.architectures, {} if options.one_of_each else None):
        print(report, flush=True)
        found.append(report)
    failed = sum(bool(report.problems) for report in found)
    print(f"\n{len(found) - failed} compiled cleanly, {failed} did not")
    if options.out:
        options.out.write_text(json.dumps([dataclasses.asdict(report) for report in found], indent=1) + "\n")
    return int(failed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
