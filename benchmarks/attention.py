"""Time of quadratic attention on a GPU: ours against cuDNN softmax attention and against our XLA forms.

`python benchmarks/attention.py`: causal, bf16, B T the same at every length. Not timed: what does not fit in memory,
and what fails its check, which compares a sample of rows, and all that their gradients reach, with the definition in
float64. Programs of one length and direction run by turns. Prints a Markdown table; writes OUT.json and OUT.png.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from twomamba_jax import decay_attention
from twomamba_jax.ops.feature_map import SCORES

FORWARD, BOTH = "forward", "forward+backward"
# Products of the causal half, 2 (T^2 / 2) K flops each: two forward (scores, outputs), five backward (the scores again,
# the gradients of weights, values, queries and keys).
PRODUCTS = {FORWARD: 2, BOTH: 7}
GIB, MIB = 2**30, 2**20
# A rounding to bf16 errs by up to 2^-8, 0.41 * 2^-8 in the root mean square. A term of a sum has been rounded about
# four times (weights, scaled operands, their gradients), so the sum errs by 0.8 * 2^-8 times the root of its squared
# terms, by 5.3 times that at the worst of ten million entries, and by 2^-8 of itself where it is written: 6 in all.
# Below 2^-20 of the largest entry's size are float32 sums, and weights so decayed that they may count as 0.
ERROR_CONSTANT, BF16, NEGLIGIBLE = 6, 2.0**-8, 2.0**-20
CHECKED_ROWS = 64
SHORT_TOKENS, SHORT_BATCH = 1000, 2  # where ours are checked beforehand, in every row
ROUNDS, ROUND_SECONDS = 3, 0.5  # of runs by turns; a slow program runs fewer times in a round
CEILING_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. temporary_bytes: of the compiled program. note: why there is no measurement."""

    implementation: str
    score: str
    direction: str
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    decay: float | None  # log decays are uniform from here to 0; None: there are none
    milliseconds: float | None = None  # the median of the runs
    runs: int = 0
    clock: str = ""  # cupti: the kernels' time on the device; wall: the whole call's
    temporary_bytes: int | None = None
    error_over_bound: float | None = None
    note: str = ""


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """What is to be measured, by length and direction."""
    for tokens, direction, implementation in itertools.product(
        options.tokens, options.directions, options.implementations
    ):
        cudnn = implementation == "cudnn"
        for score in ["exp"] if cudnn else options.scores:
            if implementation != "xla" or tokens in options.xla_tokens:
                sizes = tokens, max(options.total // tokens, 1), options.heads, options.kv_heads, options.head_dim
                decay = None if cudnn or options.no_decay else options.decay
                yield Row(implementation, score, BOTH if direction == "both" else FORWARD, *sizes, decay)


def label_of(row: Row) -> str:
    return "cuDNN softmax" if row.implementation == "cudnn" else f"{row.score}, {row.implementation}"


def make_inputs(row: Row, seed: int) -> tuple[jax.Array | None, ...]:
    """q, k, v, log_decay and a cotangent of y; for every row of a length the same ones."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), row.tokens), 5)
    heads = row.heads, row.kv_heads, row.kv_heads, row.heads
    shapes = [(row.batch, row.tokens, count, row.head_dim) for count in heads]
    q, k, v, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))
    if row.score == "linear":  # normalised, it asks for scores >= 0
        q, k = abs(q), abs(k)
    if row.decay is None:
        return q, k, v, None, dy
    return q, k, v, jax.random.uniform(keys[4], k.shape[:3], jnp.float32, minval=row.decay, maxval=0), dy


def function_of(row: Row) -> Callable:
    """(q, k, v, log_decay, dy) -> [y] or [y, dq, dk, dv, dlog_decay]; log_decay and its gradient may be None."""

    def forward(q, k, v, log_decay):
        if row.implementation == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        form = "parallel" if row.implementation == "mosaic_gpu" else None
        return decay_attention(q, k, v, log_decay, score=row.score, form=form, implementation=row.implementation)

    def both(*arrays):
        y, pull = jax.vjp(forward, *arrays[:4])
        return [y, *pull(arrays[4])]

    return both if row.direction == BOTH else lambda *arrays: [forward(*arrays[:4])]


def definition(score: str, q, k, v, log_decay, dy, rows, by_features=False) -> list[tuple[np.ndarray, np.ndarray]]:
    """y, dq, dk, dv and dlog_decay of one head in float64, each with its bound on the errors of a bf16 program.

    Arrays [T, .] and log_decay [T]. y and dq are those of `rows`, and the gradients come from these rows' outputs
    alone. by_features: the program may take <q, k>^2 for a sum of K^2 terms, as the chunked form does.
    """
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q[rows], k, v, dy[rows]))
    scale = k.shape[1] ** -0.5
    x, total = scale * q @ k.T, np.cumsum(np.asarray(log_decay, np.float64))
    decay = np.exp(np.where(np.arange(len(k)) <= rows[:, None], total[rows, None] - total, -np.inf))
    weights, slopes = {"linear": (x, x**0), "squared": (x**2, 2 * x), "exp": (np.exp(x), np.exp(x))}[score]
    decay /= (weights * decay).sum(1, keepdims=True)
    weights, slopes = weights * decay, scale * slopes * decay
    y = weights @ v
    change = dy @ v.T - (dy * y).sum(1, keepdims=True)  # the derivative with respect to a weight

    def from_each_token_on(of_rows, of_columns):
        terms = of_columns.copy()
        terms[rows] += of_rows
        return np.cumsum(terms[::-1])[::-1]

    dx, dlog = slopes * change, weights * change
    values = [y, dx @ k, dx.T @ q, weights.T @ dy, from_each_token_on(dlog.sum(1), -dlog.sum(0))]

    # The same sums of squared terms; what is a difference, or a sum of features, counts with its own terms. dlog_decay
    # is made by differences of sums over all later tokens, and may err by what is usual where it is small, too.
    lengths = [np.linalg.norm(a, axis=1, keepdims=True) for a in (dy, v, y)]
    change = abs(change) + lengths[0] * (lengths[1].T + lengths[2]) * v.shape[1] ** -0.5
    if by_features:
        terms = scale**2 * q**2 @ (k**2).T
        weights, slopes = weights + terms * decay, abs(slopes) + 2 * scale * np.sqrt(terms) * decay
    w, dx, dlog = weights**2, (slopes * change) ** 2, (weights * change) ** 2
    squares = [w @ v**2, dx @ k**2, dx.T @ q**2, w.T @ dy**2, from_each_token_on(dlog.sum(1), -dlog.sum(0))]
    squares[-1] = squares[-1] + squares[-1].mean()
    sizes = [np.sqrt(square) for square in squares]
    return [(a, ERROR_CONSTANT * BF16 * (abs(a) + s) + NEGLIGIBLE * s.max()) for a, s in zip(values, sizes)]


def error_over_bound(row: Row, program: Callable, inputs: tuple, seed: int, every_row: bool) -> float:
    """The largest error over its bound in one head of one sequence, where dy is that of the checked rows and else 0.

    NaN where any number of any head is not finite.
    """
    random = np.random.default_rng(seed)
    b, h = random.integers(row.batch), random.integers(row.heads)
    rows = np.unique([0, *random.integers(row.tokens, size=CHECKED_ROWS - 2), row.tokens - 1])
    rows = np.arange(row.tokens) if every_row else rows
    q, k, v, log_decay, dy = inputs
    got = program(q, k, v, log_decay, jnp.zeros_like(dy).at[b, rows, h].set(dy[b, rows, h]))
    if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(got)):
        return math.nan
    of_query, of_key = np.s_[b, :, h], np.s_[b, :, h * row.kv_heads // row.heads]
    decays = np.zeros(row.tokens) if log_decay is None else log_decay[of_key]
    arrays = [np.asarray(x) for x in (q[of_query], k[of_key], v[of_key], decays, dy[of_query])]
    expected = definition(row.score, *arrays, rows, by_features=(row.implementation, row.score) == ("xla", "squared"))
    places = [np.s_[b, rows, h]] * 2 + [of_key] * 3
    found = [(np.asarray(x[place], np.float64), *e) for x, place, e in zip(got, places, expected) if x is not None]
    return float(np.max([np.max(abs(x - value) / bound) for x, value, bound in found]))


def same_bits(first: list[jax.Array | None], second: list[jax.Array | None]) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second))
    return all(jnp.array_equal(*(x.view(f"u{x.dtype.itemsize}") for x in pair)) for pair in pairs)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def prepare(row: Row, seed: int, limit: float, every_row: bool = False) -> tuple[Row, tuple[Callable, tuple] | None]:
    """The row, and its program with the inputs; a note in place of these where it is not to be timed."""
    try:
        inputs = make_inputs(row, seed)
        program = jax.jit(function_of(row)).lower(*inputs).compile()
        memory = program.memory_analysis()
        row = dataclasses.replace(row, temporary_bytes=memory.temp_size_in_bytes)
        if (need := memory.temp_size_in_bytes + memory.output_size_in_bytes) > limit:
            return dataclasses.replace(row, note=f"does not fit: {need / GIB:.1f} GiB"), None
        row = dataclasses.replace(row, error_over_bound=error_over_bound(row, program, inputs, seed, every_row))
        if not row.error_over_bound <= 1:  # NaN included
            return dataclasses.replace(row, note=f"fails its check: {row.error_over_bound:.3g} times the bound"), None
        # cuDNN may add up in any order.
        if row.implementation != "cudnn" and not same_bits(program(*inputs), program(*inputs)):
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


def measure(rows: list[Row], options: argparse.Namespace) -> list[Row]:
    """The rows of one length and direction with their figures."""
    done, programs, limit = [], {}, options.memory_limit * GIB
    for place, row in enumerate(rows):
        short = dataclasses.replace(row, tokens=SHORT_TOKENS, batch=SHORT_BATCH)
        if row.implementation != "cudnn" and (note := refusal(short, options.seed, limit)):
            done.append(dataclasses.replace(row, note=note))
            continue
        row, programs[place] = prepare(row, options.seed, limit)
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
            done[place] = row = dataclasses.replace(row, milliseconds=median, runs=len(found), clock=clock)
        print(f"T={row.tokens} {row.direction} {label_of(row)}: {row.note or row.milliseconds}", file=sys.stderr)
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


def records_of(rows: list[Row], ceilings: dict[str, float]) -> list[dict]:
    """The rows with what follows from them. The flops are the quadratic form's, whatever form XLA runs."""
    peers = {(row.tokens, row.direction): row.milliseconds for row in rows if row.implementation == "cudnn"}
    records = [{"label": label_of(row)} | dataclasses.asdict(row) for row in rows]
    for row, record in zip(rows, records):
        if ms := row.milliseconds:
            flops = PRODUCTS[row.direction] * row.batch * row.heads * row.tokens**2 * row.head_dim
            record |= {"tflops": flops / ms / 1e9, "of_ceiling": flops / ms / 1e9 / ceilings["tflops"]}
            if peer := peers.get((row.tokens, row.direction)):
                record["over_cudnn"] = ms / peer
    return records


def table(records: list[dict]) -> str:
    """Markdown. Times are CUPTI's where they do not say wall."""
    columns = {"tflops": "TFLOP/s", "of_ceiling": "of ceiling", "over_cudnn": "over cuDNN", "error_over_bound": "error"}
    header = ["T", "B", "direction", "attention", "ms", *columns.values(), "scratch, MiB"]
    lines = [f"| {' | '.join(header)} |", f"|---:|---:|---|---|{'---:|' * (len(header) - 4)}"]
    for r in records:
        cells = [r["tokens"], r["batch"], r["direction"], r["label"]]
        cells.append(r["note"] or f"{r['milliseconds']:.3f}{' wall' * (r['clock'] == 'wall')}")
        cells += [format(r[key], ".0f" if key == "tflops" else ".2f") if r.get(key) else "" for key in columns]
        cells.append("" if r["temporary_bytes"] is None else f"{r['temporary_bytes'] / MIB:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(records: list[dict], title: str, path: Path) -> None:
    """Time against T, log-log, a panel per direction."""
    directions, labels, lengths = (
        [*dict.fromkeys(r[key] for r in records)] for key in ("direction", "label", "tokens")
    )
    figure = Figure(figsize=(0.5 + 5.5 * len(directions), 4.8), layout="constrained")
    figure.suptitle(title)
    for ax, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions):
        for number, label in enumerate(labels):
            here = [r for r in records if (r["label"], r["direction"], r["note"]) == (label, direction, "")]
            style = "ks--" if label == "cuDNN softmax" else f"C{number}{'x:' if 'xla' in label else 'o-'}"
            if here:
                ax.plot([r["tokens"] for r in here], [r["milliseconds"] for r in here], style, label=label)
        ax.set(title=direction, xlabel="T, tokens", ylabel="time, ms", xscale="log", yscale="log")
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend()
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and the reason."""
    pool = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf) / GIB
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, lengths = parser.add_argument, [1024, 2048, 4096, 8192, 16384, 32768]
    add("--tokens", type=int, nargs="+", default=lengths, metavar="T")
    add("--xla_tokens", type=int, nargs="*", default=[2048, 8192], metavar="T", help="those of --tokens where XLA runs")
    add("--total", type=int, default=65536, help="B T; B is at least 1")
    add("--heads", type=int, default=16)
    add("--kv_heads", type=int, help="default: as many as --heads")
    add("--head_dim", type=int, default=64)
    add("--scores", nargs="+", choices=SCORES, default=["squared", "exp", "linear"])
    add("--directions", nargs="+", choices=("forward", "both"), default=["forward", "both"])
    implementations = ["cudnn", "mosaic_gpu", "xla"]
    add("--implementations", nargs="+", choices=implementations, default=implementations)
    add("--no_decay", action="store_true", help="ours without a decay")
    # By default it forgets over 1000 tokens or so, which leaves weight to every tile near the diagonal's.
    add("--decay", type=float, default=-2e-3, help="log decays are uniform from here to 0")
    add("--iterations", type=int, default=4, help=f"the most runs in each of {ROUNDS} rounds")
    add("--memory_limit", type=float, default=0.8 * pool, metavar="GIB", help="default: 80 %% of what JAX may take")
    add("--seed", type=int, default=secrets.randbits(31), help="default: a fresh one")
    add("--out", type=Path, default=Path("docs/figures/attention"), help="writes OUT.json and OUT.png")
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
    groups = itertools.groupby(rows_of(options), key=lambda row: (row.tokens, row.direction))
    records = records_of([row for _, group in groups for row in measure(list(group), options)], ceilings)
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    device, versions = jax.devices()[0].device_kind, {}
    for name in ("twomamba-jax", "jax", "jaxlib", "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        versions |= {name: installed[name]} if name in installed else {}
    figures = {"seed": options.seed, "device": device, "versions": versions, "ceilings": ceilings, "rows": records}
    Path(f"{options.out}.json").write_text(json.dumps({"command": shlex.join(command)} | figures, indent=1) + "\n")
    sizes = f"{options.heads} heads of {options.head_dim}, bf16, B T = {options.total}"
    plot(records, f"{device}: {sizes}", Path(f"{options.out}.png"))
    print(f"{device}, {', '.join(map(' '.join, versions.items()))}; {sizes}; ceilings: bf16 matrix product ", end="")
    print(f"{ceilings['tflops']:.0f} TFLOP/s, copy {ceilings['terabytes_per_second']:.2f} TB/s\n\n{table(records)}")
    return int(any("fails its check" in record["note"] for record in records))


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 if something fails its check, 2 without a GPU."""
    options, device = parse(arguments), jax.devices()[0]
    if device.platform != "gpu":
        print(f"needs a GPU, and JAX found {device.device_kind} alone", file=sys.stderr)
        return 2
    return run(options, ["python", "benchmarks/attention.py", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
