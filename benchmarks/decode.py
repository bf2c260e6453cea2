"""Time and memory of one token of generation against the context: `python benchmarks/decode.py`.

A whole language model (the paper's small one unless told otherwise, random parameters) generates greedily in one jitted
loop, after a context that is not read but assumed: states, keys and values are random numbers, lengths are set. Nothing
in that changes what is computed. Not timed: what does not fit in memory, and what fails its check, which compares the
logits of some tokens after a real prompt by the implementation that is timed with XLA's in float32. Prints a Markdown
table; writes OUT.json as it goes, and OUT.png.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from twomamba_jax import (
    Execution,
    KeyValueCache,
    LanguageModel,
    ModelConfig,
    cache_bytes,
    init_cache,
    parse_pattern,
    state_bytes,
)
from twomamba_jax.generation import Decoding, decode_loop, row_keys
from twomamba_jax.ops.dispatch import IMPLEMENTATIONS
from twomamba_jax.ops.state import FiniteState

SIZES = {
    "small": {"d_model": 1024, "num_layers": 20, "num_heads": 16, "head_dim": 64, "mlp_dim": 2048, "vocab_size": 32000},
    "nano": {"d_model": 128, "num_layers": 4, "num_heads": 2, "head_dim": 64, "mlp_dim": 256, "vocab_size": 512},
    "tiny": {"d_model": 64, "num_layers": 2, "num_heads": 2, "head_dim": 16, "mlp_dim": 64, "vocab_size": 64},
}
GIB, MIB = 2**30, 2**20
# Both implementations round activations to the model's dtype layer by layer: logits agree to a few of its epsilons.
TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}
COPY_BYTES = 2 * GIB
WARM_UP_SECONDS = 1.0  # before the first run that counts: a GPU that was idle takes as long to reach its clock


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. state_bytes: what one token has to read of the context. note: why there is no measurement."""

    variant: str
    fold_size: int | None  # of finite states
    state_dtype: str  # of finite states; of keys and values else
    batch: int
    context: int
    milliseconds: float | None = None  # a token of every row: the median of the runs
    tokens_per_second: float | None = None
    state_bytes: int | None = None
    cache_bytes: int | None = None
    program_bytes: int | None = None  # parameters, cache and temporaries of the compiled loop
    of_copy_bandwidth: float | None = None  # state_bytes over the time, over the bandwidth of a copy
    error: float | None = None  # of the checked logits, over the largest
    note: str = ""


def rows_of(options: argparse.Namespace) -> list[Row]:
    rows = []
    for batch, variant in itertools.product(options.batches, options.variants):
        if is_finite(variant):
            for dtype, fold in itertools.product(options.state_dtypes, options.fold_sizes):
                rows += [Row(variant, fold, dtype, batch, context) for context in options.contexts]
        else:
            rows += [Row(variant, None, options.dtype, batch, context) for context in options.contexts]
    return rows


def is_finite(variant: str) -> bool:
    return all(mixer.score != "exp" for mixer in parse_pattern(variant, 1))


def model_of(variant: str, options: argparse.Namespace, implementation: str | None, precision=None) -> LanguageModel:
    sizes = SIZES[options.size]
    config = ModelConfig(**sizes, mixers=parse_pattern(variant, sizes["num_layers"]))
    dtype = jnp.dtype(options.dtype)
    how = {"implementation": implementation, "precision": precision}
    return LanguageModel(config, Execution(dtype=dtype, param_dtype=dtype, **how))


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: LanguageModel):
    return nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def start(row: Row, capacity: int, model: LanguageModel) -> Decoding:
    """A generation whose cache holds `row.context` tokens of random numbers."""
    cache = init_cache(model.config, row.batch, capacity, **kind_of(row, model))

    def random(x):
        # Positive, as normalisers are; cheap to make.
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        index = jax.lax.broadcasted_iota(jnp.uint32, (x.size,), 0) * jnp.uint32(2654435761)
        return (1 + (index >> 8) / 2.0**24).astype(x.dtype).reshape(x.shape)

    def grown(attention):
        length = jnp.full_like(attention.length, row.context)
        if isinstance(attention, KeyValueCache):
            return attention._replace(keys=random(attention.keys), values=random(attention.values), length=length)
        # The squares only, all alike: denominators |q|^2, away from 0 as they are for keys that a model has seen.
        head_dim, features = attention.keys.shape[-1], attention.state.key_sum.shape[-1]
        key_sum = jnp.broadcast_to(jnp.arange(features) < head_dim, attention.state.key_sum.shape)
        kv = jnp.where(key_sum[..., None], random(attention.state.kv), 0)
        return attention._replace(
            state=FiniteState(kv, key_sum.astype(attention.state.key_sum.dtype)),
            folded=length // row.fold_size * row.fold_size,
            length=length,
        )

    layers = tuple(layer._replace(attention=grown(layer.attention)) for layer in cache.layers)
    cache = cache._replace(layers=layers, position=jnp.full_like(cache.position, row.context))
    logits = jnp.zeros((row.batch, model.config.vocab_size), jnp.float32).at[:, 1].set(1)
    done = jnp.zeros((row.batch,), bool)
    return Decoding(cache, logits, row_keys(jax.random.key(0), row.batch), jnp.int32(0), done)


def context_bytes(row: Row, model: LanguageModel) -> int:
    """What one token has to read of the context: the states, or the keys and values of the context."""
    shapes = jax.eval_shape(lambda: start(row, row.context, model)).cache.layers
    parts = [
        (layer.attention.keys, layer.attention.values)
        if isinstance(layer.attention, KeyValueCache)
        else layer.attention.state
        for layer in shapes
    ]
    return state_bytes(parts)


def kind_of(row: Row, model: LanguageModel) -> dict:
    """What `init_cache` is told of the cache of a row."""
    finite = {"fold_size": row.fold_size, "state_dtype": jnp.dtype(row.state_dtype)} if row.fold_size else {}
    return {"dtype": model.execution.dtype} | finite


def check(row: Row, options: argparse.Namespace, params) -> float:
    """The largest difference between logits by the timed implementation and by XLA in float32, over the largest.

    Of r + 2 tokens, over a fold, after a prompt of 3 r - 1 that XLA has read; all tokens are random. In float32, since
    after as few tokens denominators are near 0 in some row of many, where features in bfloat16 move logits by a tenth
    and more. Activations are in the model's dtype all the same.
    """
    model = model_of(row.variant, options, options.implementation)
    peer = model_of(row.variant, options, "xla", "highest")
    fold = row.fold_size or 16
    size, count = 3 * fold - 1, fold + 2
    tokens = jax.random.randint(jax.random.key(1), (row.batch, size + count), 0, model.config.vocab_size)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params, cache):
        def step(cache, token):
            logits, cache = model.apply({"params": params}, token[:, None], cache=cache)
            return cache, logits

        return jax.lax.scan(step, cache, tokens[:, size:].T)[1]

    read = jax.jit(lambda params, cache: peer.apply({"params": params}, tokens[:, :size], cache=cache)[1])
    cache = read(params, init_cache(model.config, row.batch, size + count, **kind_of(row, model)))
    got, want = (np.asarray(logits(m, params, cache)) for m in (model, peer))
    return float(np.abs(got - want).max() / np.abs(want).max())


def measure(row: Row, options: argparse.Namespace, params, bandwidth: float, memory: int, programs: dict) -> Row:
    """The row with its figures; `programs` has the compiled loop of every capacity of such rows, and their error."""
    model = model_of(row.variant, options, options.implementation)
    # Programs of finite states serve every context: their shapes are the same.
    capacity = 1 if row.fold_size else row.context + options.tokens
    row = dataclasses.replace(row, state_bytes=context_bytes(row, model))
    size = cache_bytes(model.config, row.batch, capacity, **kind_of(row, model))
    row = dataclasses.replace(row, cache_bytes=size)
    if size + 2 * state_bytes(params) > memory:  # the loop takes a copy of them
        return dataclasses.replace(row, note=f"needs more than {memory / GIB:.0f} GiB")
    try:
        if "error" not in programs:  # what is checked is the same whatever the capacity
            programs["error"] = check(row, options, params)
        error = programs["error"]
        if not error <= TOLERANCE[options.dtype]:
            return dataclasses.replace(row, error=error, note=f"failed its check: {error:.1e}")
        if capacity not in programs:
            shapes = jax.eval_shape(lambda: start(row, capacity, model))
            arguments = model, params, shapes, options.tokens, 0.0, None, None, jnp.zeros((0,), jnp.int32), ()
            programs[capacity] = decode_loop.lower(*arguments).compile()
        program = programs[capacity]

        def run():
            decoding = jax.block_until_ready(start(row, capacity, model))
            begin = time.perf_counter()
            _, decoding = jax.block_until_ready(program(params, decoding, 0.0, None, jnp.zeros((0,), jnp.int32)))
            return (time.perf_counter() - begin) / options.tokens, decoding.logits

        ready = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < ready:
            run()
        times, logits = zip(*(run() for _ in range(options.runs)))
    # Out of memory, above all, and what the implementation that is named cannot do: the other rows are wanted all the
    # same.
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return dataclasses.replace(row, note=str(error).splitlines()[0][:120])
    seconds, stats = statistics.median(times), program.memory_analysis()
    if not np.isfinite(logits).all():
        return dataclasses.replace(row, note="logits that are not finite")
    return dataclasses.replace(
        row,
        milliseconds=1e3 * seconds,
        tokens_per_second=row.batch / seconds,
        program_bytes=stats.argument_size_in_bytes + stats.temp_size_in_bytes,
        of_copy_bandwidth=row.state_bytes / seconds / bandwidth,
        error=error,
    )


def copy_bandwidth() -> float:
    """Bytes per second of a copy: each byte is read once and written once."""
    x = jnp.ones((COPY_BYTES // 4,), jnp.float32)
    copy, times = jax.jit(lambda x: x + 1), []
    jax.block_until_ready(copy(x))
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - begin)
    return 2 * COPY_BYTES / min(times)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | r | state | batch | context | ms per token | tokens/s | cache, MiB | read, of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"| {row.variant} | {row.fold_size or ''} | {row.state_dtype} | {row.batch} | {row.context:,} "
        size = "" if row.cache_bytes is None else f"{row.cache_bytes / MIB:,.0f}"
        if row.note:
            lines.append(f"{name}| {row.note} | | {size} | |")
            continue
        figures = f"{row.milliseconds:.3f} | {row.tokens_per_second:,.0f} | {size} | {row.of_copy_bandwidth:.2f}"
        lines.append(f"{name}| {figures} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time and memory against the context, a column per batch, a line per model; nothing where no row was timed."""
    timed = [row for row in rows if row.milliseconds]
    batches = sorted({row.batch for row in timed})
    if not batches:
        return
    figure = Figure(figsize=(5 * len(batches), 7), layout="constrained")
    axes = figure.subplots(2, len(batches), squeeze=False, sharex=True)
    colors: dict[str, str] = {}
    for column, batch in enumerate(batches):
        lines: dict[tuple, list[Row]] = {}
        for row in timed:
            if row.batch == batch:
                lines.setdefault((row.variant, row.fold_size, row.state_dtype), []).append(row)
        for (variant, fold, dtype), line in lines.items():
            label = variant if fold is None else f"{variant}, r = {fold}, {dtype}"
            contexts = [row.context for row in line]
            style = {"label": label, "color": colors.setdefault(label, f"C{len(colors)}")}
            axes[0, column].plot(contexts, [row.milliseconds for row in line], "o-", **style)
            axes[1, column].plot(contexts, [row.cache_bytes / GIB for row in line], "o-", **style)
        axes[0, column].set(title=f"batch {batch}", ylabel="milliseconds per token")
        axes[1, column].set(xlabel="tokens of context", ylabel="cache, GiB", xscale="log", yscale="log")
        axes[0, column].set_yscale("log")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small")
    add("--dtype", choices=TOLERANCE, default="bfloat16", help="of parameters, activations, keys and values")
    add("--variants", nargs="+", default=["2mamba", "softmax"])
    add("--implementation", choices=IMPLEMENTATIONS, help="of the attention; default: what is chosen")
    add("--fold_sizes", nargs="+", type=int, default=[1, 16, 64])
    add("--state_dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--batches", nargs="+", type=int, default=[1, 8, 64])
    add("--contexts", nargs="+", type=int, default=[2**10, 2**12, 2**14, 2**16, 2**18, 2**20])
    add("--tokens", type=int, default=64, help="generated in a run")
    add("--runs", type=int, default=3)
    add("--memory", type=float, help="GiB to use; default: 90 %% of the device's, or 8")
    add("--out", type=Path, default=Path("build/decode"), help="without suffix")
    add("--plot", nargs="+", type=Path, help="draw the rows of these files instead")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.plot:
        rows = [Row(**record) for path in options.plot for record in json.loads(path.read_text())["rows"]]
    else:
        device = jax.devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", 8 * GIB)
        memory = int(options.memory * GIB if options.memory else 0.9 * limit)
        bandwidth, rows, params, kind = copy_bandwidth(), [], {}, None
        print(f"{device.device_kind}: a copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        record = {"device": device.device_kind, "copy_bytes_per_second": bandwidth, "versions": versions}
        record |= {"command": " ".join(["python benchmarks/decode.py", *arguments])}
        for row in rows_of(options):
            if row.variant not in params:
                params = {row.variant: init_params(model_of(row.variant, options, options.implementation))}
            if kind != (kind := (row.variant, row.fold_size, row.state_dtype, row.batch)):
                programs = {}
            rows.append(measure(row, options, params[row.variant], bandwidth, memory, programs))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            record["rows"] = [dataclasses.asdict(row) for row in rows]
            options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
