"""Time of attention on a GPU: our quadratic and chunked kernels against cuDNN softmax attention and our XLA form.

`python benchmarks/attention.py`: causal, bf16, B T the same at every length. Not timed: what does not fit in memory,
and what fails its check, which compares a sample of rows, and all that their gradients reach, with the definition in
float64. Programs of one length and direction run by turns. Prints a Markdown table, and what it found of the rows of
pallas_kernels/chunked/crossovers.py; writes OUT.json and OUT.png. `--unchecked` leaves out the check, which takes
longer than the rest, where `pytest -m gpu tests/kernels` has passed. `--plot A.json B.json` shows several runs as
one, such as `--tokens 1024 2048 4096 8192` and `--tokens 16384 32768`, or `--rows cudnn chunked` and the others. On a
GPU that is no Hopper: `--rows cudnn triton-quadratic triton-chunked xla`.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import secrets
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from attention_check import error_over_bound, same_bits
from attention_report import GIB, crossovers_of, merged, plot, records_of, table, tables_of_kernels
from attention_rows import ATTENTIONS, CUDNN, LONGEST_BOTH, OF_HOPPER, Row, function_of, make_inputs, rows_of

from twomamba_jax.ops.score import SCORES

# Where ours are checked beforehand, in every row.
SHORT_TOKENS = {name: 2500 if name.endswith("chunked") else 1000 for name in ATTENTIONS}
SHORT_BATCH = 2
ROUNDS, ROUND_SECONDS = 3, 0.5  # of runs by turns; a slow program runs fewer times in a round
CEILING_SIZE = 8192


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def prepare(
    row: Row, seed: int, limit: float, check: bool = True, every_row: bool = False
) -> tuple[Row, tuple[Callable, tuple] | None]:
    """The row, and its program with the inputs; a note in place of these where it is not to be timed."""
    try:
        inputs = make_inputs(row, seed)
        program = jax.jit(function_of(row)).lower(*inputs).compile()
        memory = program.memory_analysis()
        need = memory.temp_size_in_bytes + memory.output_size_in_bytes
        peak = need + memory.argument_size_in_bytes
        row = dataclasses.replace(row, temporary_bytes=memory.temp_size_in_bytes, peak_bytes=peak)
        if need > limit:
            return dataclasses.replace(row, note=f"does not fit: {need / GIB:.1f} GiB"), None
        if not check:
            return row, (program, inputs)
        row = dataclasses.replace(row, error_over_bound=error_over_bound(row, program, inputs, seed, every_row))
        if not row.error_over_bound <= 1:  # NaN included
            return dataclasses.replace(row, note=f"fails its check: {row.error_over_bound:.3g} times the bound"), None
        # cuDNN may add up in any order.
        if row.attention != CUDNN and not same_bits(program(*inputs), program(*inputs)):
            return dataclasses.replace(row, note="fails its check: two runs differ"), None
    except Exception as error:  # Whatever a compiler or a device raises: the other rows are wanted all the same.
        return dataclasses.replace(row, note=reason(error)), None
    return row, (program, inputs)


@functools.cache
def refusal(row: Row, seed: int, limit: float) -> str:
    """Why the program of a short row fails the check of every row of a head; empty where it passes."""
    note = prepare(row, seed, limit, every_row=True)[0].note
    return note and f"{note} (T = {row.tokens})"


def time_of(program: Callable, inputs: tuple, most: int) -> list[tuple[str, float]]:
    """The clock and the milliseconds of up to `most` runs, after some that warm up."""

    def wall():
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        return 1e3 * (time.perf_counter() - start)

    wall()
    runs = max(1, min(most, int(1e3 * ROUND_SECONDS / wall())))
    with contextlib.suppress(ImportError, RuntimeError):  # CUPTI is missing or taken, or the runs differ in kernels.
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(program, iterations=runs)(*inputs)
        if times is not None:
            return [("cupti", float(x)) for x in np.ravel(times)]
    return [("wall", wall()) for _ in range(runs)]


def kernels_of(program: Callable, inputs: tuple) -> dict[str, float]:
    """Milliseconds of each kernel of one run, the longest first; those of one name together."""
    times, total = None, Counter()
    with contextlib.suppress(ImportError, RuntimeError):  # as in `time_of`; too little memory is a RuntimeError too
        from jax.experimental.mosaic.gpu import profiler

        _, times = profiler.measure(program, aggregate=False)(*inputs)
    for name, milliseconds in times or ():
        total[name.partition("_mosaic")[0]] += milliseconds
    return dict(total.most_common())


def measure(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """The rows of one length and direction with their figures."""
    done, programs, limit, check = [], {}, options.memory_limit * GIB, not options.unchecked
    for place, row in enumerate(rows):
        short = dataclasses.replace(row, tokens=SHORT_TOKENS[row.attention], batch=SHORT_BATCH)
        if check and row.attention != CUDNN and (note := refusal(short, options.seed, limit)):
            done.append(dataclasses.replace(row, note=note))
            continue
        row, programs[place] = prepare(row, options.seed, limit, check)
        done.append(row)
    times = {place: [] for place, program in programs.items() if program}
    for place in [*times] * ROUNDS:
        try:
            times[place] += time_of(*programs[place], options.iterations)
        except Exception as error:
            done[place] = dataclasses.replace(done[place], note=reason(error))
    for place, row in enumerate(done):
        if place in times and not row.note:
            clock = min(clock for clock, _ in times[place])  # CUPTI's where there are both
            found = [milliseconds for name, milliseconds in times[place] if name == clock]
            median = statistics.median(found)
            kernels = kernels_of(*programs[place]) if options.kernels else {}
            figures = {"milliseconds": median, "runs": len(found), "clock": clock, "kernels": kernels}
            done[place] = row = dataclasses.replace(row, **figures)
        print(f"T={row.tokens} {row.direction} {row.label}: {row.note or row.milliseconds}", file=sys.stderr)
    return done


def measure_ceilings(iterations: int) -> dict[str, float]:
    """What the device reaches: a bf16 matrix product, and a copy (a negation, so that it is a kernel)."""
    x = jax.random.normal(jax.random.key(0), (4 * CEILING_SIZE, 2 * CEILING_SIZE), jnp.bfloat16)
    square = x[:CEILING_SIZE, :CEILING_SIZE]
    product, copy = (
        statistics.median(ms for _, ms in time_of(jax.jit(f).lower(*inputs).compile(), inputs, iterations))
        for f, inputs in ((jnp.matmul, (square, square)), (jnp.negative, (x,)))
    )
    return {"tflops": 2 * CEILING_SIZE**3 / product / 1e9, "terabytes_per_second": 2 * x.nbytes / copy / 1e9}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and the reason."""
    pool = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf) / GIB
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, lengths = parser.add_argument, [2**n for n in range(10, 18)] + [2**19]
    help_ = f"forward only above {LONGEST_BOTH}"
    add("--tokens", type=int, nargs="+", default=lengths, metavar="T", help=help_)
    help_ = "those of --tokens where XLA runs"
    add("--xla_tokens", type=int, nargs="*", default=[2048, 8192, 131072], metavar="T", help=help_)
    add("--total", type=int, default=65536, help="B T; B is at least 1")
    add("--heads", type=int, default=16)
    add("--kv_heads", type=int, help="default: as many as --heads")
    add("--head_dim", type=int, default=64)
    add("--scores", nargs="+", choices=SCORES, default=["squared", "exp", "linear"])
    add("--directions", nargs="+", choices=("forward", "both"), default=["forward", "both"])
    add("--rows", nargs="+", choices=ATTENTIONS, default=[*OF_HOPPER])
    add("--no_decay", action="store_true", help="ours without a decay")
    # By default it forgets over 1000 tokens or so, which leaves weight to every tile near the diagonal's.
    add("--decay", type=float, default=-2e-3, help="log decays are uniform from here to 0")
    add("--unchecked", action="store_true", help="times programs that were not compared with the definition")
    add("--iterations", type=int, default=4, help=f"the most runs in each of {ROUNDS} rounds")
    add("--kernels", action="store_true", help="also the time of each kernel, which needs CUPTI")
    add("--memory_limit", type=float, default=0.8 * pool, metavar="GIB", help="default: 80 %% of what JAX may take")
    add("--seed", type=int, default=secrets.randbits(31), help="default: a fresh one")
    add("--out", type=Path, default=Path("docs/figures/attention"), help="writes OUT.json and OUT.png")
    add("--plot", type=Path, nargs="+", metavar="JSON", help="measures nothing: shows what earlier runs have written")
    options = parser.parse_args(arguments)
    options.kv_heads = options.kv_heads or options.heads
    if min(options.heads, options.kv_heads, options.head_dim, options.total, options.iterations, *options.tokens) < 1:
        parser.error("the sizes and --iterations must be at least 1")
    if options.heads % options.kv_heads:
        parser.error(f"--heads {options.heads} must be a multiple of --kv_heads {options.kv_heads}")
    if not options.decay <= 0:
        parser.error(f"--decay {options.decay} must not be above 0")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return options


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Measures, prints and writes; the exit status."""
    ceilings = measure_ceilings(options.iterations)
    versions = {}
    for name in ("twomamba-jax", "jax", "jaxlib", "numpy", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    sizes = f"{options.heads} heads of {options.head_dim}, bf16, B T = {options.total}"
    report = {"command": shlex.join(command), "seed": options.seed, "device": jax.devices()[0].device_kind}
    report |= {"versions": versions, "sizes": sizes, "ceilings": ceilings}
    rows, report["rows"] = [], []
    for _, group in itertools.groupby(rows_of(options), key=lambda row: (row.tokens, row.direction)):
        rows += measure(list(group), options)
        report["rows"] = records_of(rows, ceilings)
        # Now, and not at the end: whoever stops it keeps the lengths so far.
        Path(f"{options.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report, options.out)
    print(f"\nceilings: bf16 matrix product {ceilings['tflops']:.0f} TFLOP/s, copy ", end="")
    print(f"{ceilings['terabytes_per_second']:.2f} TB/s")
    return int(any("fails its check" in record["note"] for record in report["rows"]))


def show(report: dict, out: Path) -> None:
    """Prints the table and the crossovers of a report, and writes OUT.png."""
    device, sizes, records = report["device"], report["sizes"], report["rows"]
    crossovers = crossovers_of(records, device)
    plot(records, crossovers, f"{device}: {sizes}", Path(f"{out}.png"))
    versions = ", ".join(map(" ".join, report["versions"].items()))
    print(f"{device}, {versions}; {sizes}", table(records), *tables_of_kernels(records), *crossovers, sep="\n\n")


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 if something fails its check, 2 without a GPU."""
    options, device = parse(arguments), jax.devices()[0]
    if options.plot:
        try:
            show(merged(options.plot), options.out)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    if device.platform != "gpu":
        print(f"needs a GPU, and JAX found {device.device_kind} alone", file=sys.stderr)
        return 2
    return run(options, ["python", "benchmarks/attention.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
