"""Time and compiled memory of the forms of `decay_attention` against T: `python benchmarks/forms.py --backward`.

One sequence in float32, with decay, normalised. Not timed: what does not fit in memory, and what fails its check, which
compares a sample of rows with the definition in float64. Prints Markdown tables; writes OUT.json and OUT.png.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from twomamba_jax import decay_attention, init_state, state_bytes
from twomamba_jax.ops.dispatch import FORMS
from twomamba_jax.ops.score import FINITE_SCORES, SCORES

FORWARD, BOTH = "forward", "forward+backward"
GIB, MIB = 2**30, 2**20
# Row i may err by c eps kappa_i max|v| (the numerics contract, point 4). A gradient is what comes through the numerator
# less what comes through the denominator, and may err by c eps kappa times the largest entry of the former.
ERROR_CONSTANT, CHECKED_ROWS = 5, 128
FEWEST_RUNS, MOST_RUNS, BUDGET_SECONDS = 3, 50, 3.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. bytes: the compiled program's temporaries and outputs. note: why there is no measurement."""

    score: str
    tokens: int
    heads: int
    head_dim: int
    form: str
    direction: str
    milliseconds: float | None = None  # the median of the runs
    runs: int = 0
    bytes: int | None = None
    error_over_bound: float | None = None
    note: str = ""


def make_arrays(score: str, tokens: int, heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    """q, k, v, log_decay and a cotangent of y. The decay forgets over 1000 tokens or so: states carry over chunks."""
    random = np.random.default_rng(0)
    q, k, v, dy = random.normal(size=(4, 1, tokens, heads, head_dim))
    if score == "linear":  # normalised, it asks for scores >= 0
        q, k = np.abs(q), np.abs(k)
    log_decay = -random.uniform(0, 2e-3, size=(1, tokens, heads))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, dy))


def definition(score: str, q, k, v, log_decay, rows):
    """The definition at some rows of the sequence: y [1, R, H, V], y for a fixed denominator, and kappa [1, R, H, 1].

    kappa_i is the sum of the terms' sizes over the sum of the weights: |q_i|^2 sum_j L_ij |k_j|^2 / sum_j w_ij for
    `squared`, the same without squares for `linear`; for `exp`, a term of exponent x errs by 1 + |x|.
    """
    q = q[:, rows] * q.shape[-1] ** -0.5
    x = jnp.einsum("brhk,bjhk->brhj", q, k)
    size = jnp.linalg.norm(q, axis=-1)[..., None] * jnp.moveaxis(jnp.linalg.norm(k, axis=-1), 1, 2)[:, None]
    weights = {"linear": x, "squared": x * x, "exp": jnp.exp(x)}[score]
    terms = {"linear": size, "squared": size * size, "exp": weights * (1 + size)}[score]
    total = jnp.cumsum(log_decay, axis=1)
    decay = total[:, rows, :, None] - jnp.moveaxis(total, 1, 2)[:, None]
    decay = jnp.exp(jnp.where((jnp.arange(k.shape[1]) <= rows[:, None])[:, None], decay, -jnp.inf))
    denominator = (weights * decay).sum(-1, keepdims=True)
    numerator = jnp.einsum("brhj,bjhv->brhv", weights * decay, v)
    kappa = (terms * decay).sum(-1, keepdims=True) / denominator
    return (numerator / denominator, numerator / jax.lax.stop_gradient(denominator)), kappa


@functools.partial(jax.jit, static_argnums=0)
def reference(score: str, inputs: tuple[jax.Array, ...], dy: jax.Array, rows: jax.Array):
    """dy for the better-conditioned half of the rows, [y, dq, dk, dv, dlog_decay], and the bound of each over eps."""
    (y, _), pull, kappa = jax.vjp(lambda *x: definition(score, *x, rows), *inputs, has_aux=True)
    dy = jnp.where(kappa <= jnp.median(kappa), dy[:, rows], 0)
    sizes = [jnp.abs(x).max() for x in (inputs[2], *pull((0 * dy, dy)))]
    sizes = [kappa * sizes[0], *(jnp.median(kappa) * x for x in sizes[1:])]
    return dy, [y, *pull((dy, 0 * dy))], [ERROR_CONSTANT * size for size in sizes]


def make_check(score: str, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, Callable]:
    """A cotangent of y, and a function that takes y (and its gradients) to the largest error over its bound.

    It compares with the definition in float64 at a sample of rows, and gives NaN where it finds one. The cotangent is
    zero but for the better-conditioned half of those rows, so that the gradients' kappa is the median.
    """
    tokens = arrays[0].shape[1]
    rows = np.unique([0, *np.random.default_rng(1).integers(tokens, size=CHECKED_ROWS - 2), tokens - 1])
    with jax.enable_x64(True):
        *inputs, dy = (jnp.asarray(np.asarray(x), jnp.float64) for x in arrays)
        dy, expected, sizes = jax.tree.map(np.asarray, reference(score, tuple(inputs), dy, jnp.asarray(rows)))
    bounds = [np.finfo(np.float32).eps * size for size in sizes]

    def error_over_bound(y, *gradients) -> float:
        got = [np.asarray(x, np.float64) for x in (y[:, rows], *gradients)]
        return float(np.max([np.max(np.abs(g - e) / bound) for g, e, bound in zip(got, expected, bounds)]))

    return jnp.zeros_like(arrays[4]).at[:, rows].set(np.asarray(dy, np.float32)), error_over_bound


def function_of(row: Row) -> Callable:
    """(q, k, v, log_decay, dy) -> [y] or [y, dq, dk, dv, dlog_decay]."""
    forward = functools.partial(decay_attention, score=row.score, form=row.form)

    def both(*arrays):
        y, pull = jax.vjp(forward, *arrays[:4])
        return [y, *pull(arrays[4])]

    return both if row.direction == BOTH else lambda *arrays: [forward(*arrays[:4])]


def least_memory(row: Row) -> tuple[int, str]:
    """The bytes that the form holds by its nature, and what they are."""
    if row.form == "recurrent":
        state = jax.eval_shape(lambda: init_state(row.score, 1, row.heads, row.head_dim, row.head_dim))
        return row.tokens * state_bytes(state), "states"
    return (4 * row.heads * row.tokens**2, "weights") if row.form == "parallel" else (0, "weights")


def measure(row: Row, arrays: tuple[jax.Array, ...], check: tuple[jax.Array, Callable], limit: float) -> Row:
    """The row with its figures; with a note instead where it needs more than `limit` bytes or fails its check."""
    (cotangent, error_over_bound), (least, kind) = check, least_memory(row)
    need = f"{least / GIB:.1f} GiB of {kind}"
    if least > limit:
        return dataclasses.replace(row, note=f"does not fit: {need}")
    compiled = jax.jit(function_of(row)).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    row = dataclasses.replace(row, bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes)
    if row.bytes > limit:
        return dataclasses.replace(row, note=f"does not fit: {need}, {row.bytes / GIB:.1f} GiB in all")
    row = dataclasses.replace(row, error_over_bound=error_over_bound(*compiled(*arrays[:4], cotangent)))
    if not row.error_over_bound <= 1:  # NaN included
        return dataclasses.replace(row, note=f"fails its check: {row.error_over_bound:.3g} times the bound")
    times = []
    while len(times) < FEWEST_RUNS or (len(times) < MOST_RUNS and sum(times) < BUDGET_SECONDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return dataclasses.replace(row, milliseconds=1e3 * statistics.median(times), runs=len(times))


def measure_all(options: argparse.Namespace) -> list[Row]:
    """Every form and direction at every length, shortest first; a form ends where it no longer fits."""
    rows, ended = [], set()
    for tokens in options.lengths:
        arrays = make_arrays(options.score, tokens, options.heads, options.head_dim)
        check = make_check(options.score, arrays)
        for direction in [FORWARD, BOTH][: 1 + options.backward]:
            for form in (form for form in options.forms if (form, direction) not in ended):
                row = Row(options.score, tokens, options.heads, options.head_dim, form, direction)
                rows.append(row := measure(row, arrays, check, options.memory_limit * GIB))
                if row.note.startswith("does not fit"):
                    ended.add((form, direction))
                print(f"T={tokens} {form} {direction}: {row.note or f'{row.milliseconds:.1f} ms'}", file=sys.stderr)
    return rows


def table(rows: list[Row], direction: str) -> str:
    """Markdown: milliseconds and MiB of every form against T, and the KiB per token of chunked."""
    forms, found = list(dict.fromkeys(r.form for r in rows)), {(r.tokens, r.form, r.direction): r for r in rows}
    header = ["T", *(f"{form}, ms" for form in forms), *(f"{form}, MiB" for form in forms)]
    header += ["chunked, KiB per token"] * ("chunked" in forms)
    lines = [f"| {' | '.join(header)} |", f"|{'---:|' * len(header)}"]
    for tokens in sorted({r.tokens for r in rows}):
        here = [found.get((tokens, form, direction)) for form in forms]
        cells = [str(tokens), *(r.note or f"{r.milliseconds:.1f}" if r else "" for r in here)]
        cells += [f"{r.bytes / MIB:.1f}" if r and r.bytes else "" for r in here]
        cells += [f"{r.bytes / tokens / 2**10:.1f}" for r in here if r and r.bytes and r.form == "chunked"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Time left and memory right, log-log, panels per direction. The legend has the slopes at the long end."""
    directions, lengths = list(dict.fromkeys(r.direction for r in rows)), sorted({r.tokens for r in rows})
    figure = Figure(figsize=(11, 0.6 + 4.2 * len(directions)), layout="constrained")
    figure.suptitle(f"decay_attention, score {rows[0].score}, {rows[0].heads} heads of {rows[0].head_dim}, float32")
    quantities = [("milliseconds", 1, "time, ms"), ("bytes", MIB, "compiled temporaries and outputs, MiB")]
    for axes, direction in zip(figure.subplots(len(directions), 2, squeeze=False), directions):
        for ax, (field, unit, label) in zip(axes, quantities):
            for form in dict.fromkeys(r.form for r in rows if r.direction == direction and not r.note):
                here = [r for r in rows if (r.form, r.direction, r.note) == (form, direction, "")]
                t, values = np.array([(r.tokens, getattr(r, field) / unit) for r in here]).T
                slope = f", slope {np.polyfit(np.log(t[-3:]), np.log(values[-3:]), 1)[0]:.2f}" if len(t) > 1 else ""
                ax.plot(t, values, "o-", color=f"C{FORMS.index(form)}", label=form + slope)
            ax.set(title=direction, xlabel="T, tokens", ylabel=label, xscale="log", yscale="log")
            ax.set_xticks(lengths, lengths)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            if ax.lines:
                ax.legend()
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. A wrong one ends the program with status 2 and the reason."""
    told = jax.devices()[0].memory_stats() or {}
    memory = told.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", choices=SCORES, default="squared")
    parser.add_argument("--lengths", default="256,512,1024,2048,4096,8192,16384", metavar="T,T,...")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--forms", metavar="FORM,...", help="default: all that the score has")
    parser.add_argument("--backward", action="store_true", help="measure forward+backward too")
    parser.add_argument("--memory-limit", type=float, default=memory / GIB / 2, metavar="GIB", help="default: half")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/forms"), help="writes OUT.json and OUT.png")
    options = parser.parse_args(arguments)
    possible = [form for form in FORMS if form != "recurrent" or options.score in FINITE_SCORES]
    options.forms = options.forms.split(",") if options.forms else possible
    if unknown := set(options.forms) - set(possible):
        parser.error(f"--forms {', '.join(unknown)}: the score {options.score} has {', '.join(possible)}")
    try:
        options.lengths = sorted({int(tokens) for tokens in options.lengths.split(",")})
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except ValueError:
        parser.error(f"--lengths {options.lengths}: expected integers with commas between them")
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    if min(options.heads, options.head_dim, options.memory_limit) <= 0 or options.lengths[0] < 2:
        parser.error("--heads, --head-dim and --memory-limit must be above 0, and --lengths above 1")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measures, prints and writes. The exit status is 1 if a form fails its check."""
    options = parse(arguments)
    rows = measure_all(options)
    for direction in dict.fromkeys(r.direction for r in rows):
        print(f"{direction}:\n\n{table(rows, direction)}\n")
    report = {
        "device": {"kind": jax.devices()[0].device_kind, "cpu_count": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in ("twomamba-jax", "jax", "jaxlib", "numpy")},
        "memory_limit_gib": options.memory_limit,
        "rows": [{"batch": 1, "dtype": "float32", **dataclasses.asdict(row)} for row in rows],
    }
    Path(f"{options.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, Path(f"{options.out}.png"))
    return int(any(row.note.startswith("fails") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
