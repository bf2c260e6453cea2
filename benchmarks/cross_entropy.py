"""Time and memory of the loss, its gradients and the hits, three ways: `python benchmarks/cross_entropy.py`.

`plain` makes all the logits; `recomputed` goes through chunks of tokens and computes their logits again in the backward
pass; `cross_entropy` is train/cross_entropy.py, whose chunks have their gradient taken in the forward pass, also with a
kernel for the rows of the logits where there is one, as the training program takes it. Each is checked against `plain`.
Prints a Markdown table: the median of several runs, the CPU time of the fastest, and the temporaries of the compiled
program.
"""

import argparse
import functools
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Sequence

import clone  # noqa: F401
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from train.cross_entropy import cross_entropy
from twomamba_jax.layers.language_model import head_logits
from twomamba_jax.ops.elementwise import Elementwise

MIB = 2**20


def plain(x, kernel, targets, weights):
    logits = head_logits(x, kernel)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(weights * losses), jnp.sum(weights * hits)


def recomputed(x, kernel, targets, weights, chunk_size):
    parts = [array.reshape(-1, chunk_size, *array.shape[2:]) for array in (x, targets, weights)]
    sums = jax.lax.map(lambda chunk: jax.checkpoint(plain)(chunk[0], kernel, *chunk[1:]), tuple(parts))
    return tuple(jnp.sum(part) for part in sums)


def chunked(x, kernel, targets, weights, chunk_size, **kernels):
    sums = cross_entropy(x, kernel, targets, weights, chunk_size, **kernels)
    return sums.loss, sums.correct


def main(arguments: Sequence[str]) -> int:
    """Measures and prints. The exit status is 1 if a gradient is not that of `plain`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 2), ("length", 1024), ("width", 256), ("vocab", 32_000), ("chunk", 512), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the hidden states")
    options = parser.parse_args(arguments)
    tokens = options.batch * options.length
    if tokens % options.chunk:
        parser.error(f"--chunk {options.chunk} must divide the {tokens} tokens of the batch")

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (options.batch, options.length, options.width), options.dtype)
    kernel = 0.02 * jax.random.normal(keys[1], (options.width, options.vocab))
    targets = jax.random.randint(keys[2], (options.batch, options.length), 0, options.vocab)
    operands = x, kernel, targets, jnp.ones(targets.shape)
    functions = {
        "plain": plain,
        "recomputed": functools.partial(recomputed, chunk_size=options.chunk),
        "cross_entropy": functools.partial(chunked, chunk_size=options.chunk),
        "cross_entropy, one chunk": functools.partial(chunked, chunk_size=tokens),
    }
    kernels, logits = Elementwise(None), jax.ShapeDtypeStruct((options.chunk, options.vocab), jnp.float32)
    if kernels.kernels("loss", (logits, PartitionSpec())):
        functions["cross_entropy, kernel"] = functools.partial(chunked, chunk_size=options.chunk, elementwise=kernels)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    print(f"{jax.devices()[0].device_kind}; {versions}; {vars(options)}\n")
    print("| way | ms | CPU ms | temporaries, MiB | largest error of a gradient |\n|---|---:|---:|---:|---:|")
    expected, bound, right = None, 8 * float(jnp.finfo(options.dtype).eps), True
    for name, function in functions.items():
        program = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True)).lower(*operands).compile()
        found = jax.block_until_ready(program(*operands))
        expected = expected or found
        error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found[1], expected[1]))
        right &= error <= bound
        times = []
        for _ in range(options.runs):
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*operands))
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        wall, cpu = statistics.median(wall for wall, _ in times), min(cpu for _, cpu in times)
        memory = program.memory_analysis().temp_size_in_bytes / MIB
        print(f"| {name} | {1e3 * wall:.1f} | {1e3 * cpu:.1f} | {memory:.1f} | {error:.1e} |")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
