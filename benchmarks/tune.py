"""Chooses the tile sizes of the quadratic kernels on this GPU: `python benchmarks/tune.py`.

Times every candidate below (forward and backward, with decay, normalised, 65,536 tokens x 16 heads), refuses what
disagrees with the first candidate, and writes pallas_kernels/quadratic/table.py; entries of other devices, scores, head
dims and lengths stay. `benchmarks/compile_kernels.py` says whether the new entries compile cleanly. With
`--implementation triton` it prints the entries of pallas_kernels/triton/quadratic/table.py, one for all lengths, and
`benchmarks/compile_triton.py` has that say.
"""

import argparse
import dataclasses
import itertools
import pprint
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.device import device_kind, unsupported_device
from pallas_kernels.quadratic import mosaic_gpu, table, tuning
from pallas_kernels.quadratic.attention import Attention, attention
from pallas_kernels.triton import device as triton

KERNELS = ("forward", "backward_queries", "backward_keys")
TOTAL, HEADS, ITERATIONS, TOLERANCE = 65536, 16, 5, 2e-2
SHARED = {"resident": False}
NARROW = {"own": 128, "streamed": 64}
WIDE = {"own": 128, "streamed": 128}
LEAN = {"consumer_registers": 240, "producer_registers": 24, "part": 32}


@dataclasses.dataclass(frozen=True)
class Language:
    """Kernels to tune.

    Attributes:
      kernels: that attention takes.
      tuning: (the tiles of the three kernels, as in the table) -> their tuning.
      candidates: (score, head dim) -> the tiles to try.
      names: (score) -> what the device calls the three kernels, or how that begins.
    """

    kernels: object
    tuning: Callable
    candidates: Callable
    names: Callable[[str], tuple[str, ...]]


def mosaic_language() -> Language:
    """The kernels in Pallas Mosaic GPU."""
    return Language(
        mosaic_gpu.KERNELS,
        lambda tiles: tuning.Tuning(*(tuning.Tiles(**t) for t in tiles)),
        candidates,
        lambda score: tuple(f"{score}_{kernel}_mosaic" for kernel in KERNELS),
    )


def triton_language() -> Language:
    """The kernels in Triton."""
    from pallas_kernels.triton.quadratic import kernels, programs, tiles  # slow to import, and an extra

    return Language(
        kernels.KERNELS,
        lambda entries: tiles.Tuning(*(tiles.Tiles(**t) for t in entries)),
        lambda score, head_dim: triton_candidates(head_dim),
        lambda score: tuple(kernel.__name__ for kernel in programs.BY_NAME.values()),
    )


def triton_candidates(head_dim: int) -> list[tuple[dict, dict, dict]]:
    """The same tiles for all three kernels; not every GPU has the shared memory or registers for all of them."""
    names = "own", "streamed", "warps", "num_stages"
    wide = [(64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3)]
    narrow = [(64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 3), (128, 64, 8, 2)]
    return [(dict(zip(names, sizes)),) * 3 for sizes in (wide if head_dim == 64 else narrow)]


def candidates(score: str, head_dim: int) -> list[tuple[dict, dict, dict]]:
    """Tiles to try, as in the table; those of the three kernels are timed side by side but chosen one by one."""
    if head_dim == 128:
        forward = [NARROW | {"num_stages": n} for n in (3, 2)]
        queries = [NARROW | SHARED | {"num_stages": n} for n in (3, 2)]
        keys = [NARROW | SHARED | LEAN | {"num_stages": 2}]
    else:
        kind = SHARED if score == "exp" else {"part": 64} if score == "squared" else {}
        forward = [WIDE | kind | {"num_stages": n} for n in (3, 4)] + [WIDE | {"num_stages": n} for n in (3, 4)]
        queries = [NARROW | {"num_stages": 4}, NARROW | SHARED | {"num_stages": 4}, NARROW | SHARED | {"num_stages": 3}]
        keys = [NARROW | SHARED | {"num_stages": n} for n in (3, 4)]
    length = max(map(len, (forward, queries, keys)))
    return [tuple(kind[min(i, len(kind) - 1)] for kind in (forward, queries, keys)) for i in range(length)]


def arrays(score: str, tokens: int, head_dim: int) -> tuple[jax.Array, ...]:
    """q, k, v, log_decay and dy; the decay forgets over 1000 tokens or so."""
    shape = (TOTAL // tokens, tokens, HEADS)
    *keys, last = jax.random.split(jax.random.key(0), 5)
    q, k, v, dy = (jax.random.normal(key, (*shape, head_dim), jnp.bfloat16) for key in keys)
    if score == "linear":  # normalised, it asks for scores >= 0
        q, k = abs(q), abs(k)
    return q, k, v, -2e-3 * jax.random.uniform(last, shape), dy


def measure(
    language: Language, score: str, tiles: tuple[dict, dict, dict], inputs
) -> tuple[dict[str, float], list[jax.Array]]:
    """Milliseconds of each kernel (the median), and y and the gradients."""
    scale = inputs[0].shape[-1] ** -0.5
    spec = Attention(language.kernels, score, True, scale, 2.0**-100, language.tuning(tiles))

    def both(q, k, v, log_decay, dy):
        y, pull = jax.vjp(lambda *x: attention(spec, *x, None), q, k, v, log_decay)
        return [y, *pull(dy)]

    outputs, runs = profiler.measure(jax.jit(both), iterations=ITERATIONS, aggregate=False)(*inputs)
    times = {
        kernel: statistics.median(sum(ms for name, ms in run if name.startswith(start)) for run in runs)
        for kernel, start in zip(KERNELS, language.names(score))
    }
    return times, outputs


def agree(a: list[jax.Array], b: list[jax.Array]) -> bool:
    """Whether all pairs differ by little, relative to the largest entry; NaN never does."""
    errors = [jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y.astype(jnp.float32)).max() for x, y in zip(a, b)]
    return bool(jnp.max(jnp.stack(errors)) < TOLERANCE)


def choose(language: Language, score: str, head_dim: int, tokens: int) -> tuple[dict, dict, dict]:
    """The fastest tiles of each kernel."""
    inputs, reference = arrays(score, tokens, head_dim), None
    best = [(float("inf"), None)] * len(KERNELS)
    for tiles in language.candidates(score, head_dim):
        try:
            times, outputs = measure(language, score, tiles, inputs)
        except jax.errors.JaxRuntimeError as error:  # more shared memory than there is
            print(f"{score} {head_dim} {tiles[0]}  REFUSED: {' '.join(str(error).split())[:120]}", flush=True)
            continue
        reference = reference or outputs
        verdict = "" if agree(outputs, reference) else "  REFUSED: differs from the first"
        for i, kernel in enumerate(KERNELS):
            print(f"{score} {head_dim} T={tokens} {kernel}: {times[kernel]:.3f} ms {tiles[i]}{verdict}", flush=True)
            if not verdict:
                best[i] = min(best[i], (times[kernel], tiles[i]), key=lambda pair: pair[0])
    return tuple(tiles for _, tiles in best)


def write(entries: dict) -> None:
    """Writes the table as a module."""
    path = Path(table.__file__)
    text = f"{path.read_text().split('TABLE = ')[0]}TABLE = {pprint.pformat(entries, width=110, sort_dicts=False)}\n"
    path.write_text(text)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(path)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="+", default=["squared", "exp", "linear"])
    parser.add_argument("--head_dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192], help="upper ends of the buckets")
    parser.add_argument("--implementation", choices=("mosaic_gpu", "triton"), default="mosaic_gpu")
    options = parser.parse_args()
    in_triton = options.implementation == "triton"
    if reason := triton.unsupported_device() if in_triton else unsupported_device():
        sys.exit(f"nothing to tune here: {reason}")
    language = triton_language() if in_triton else mosaic_language()
    cases = list(itertools.product(options.scores, options.head_dims, options.tokens))
    if in_triton:
        longest = max(options.tokens)
        best = {case: choose(language, *case) for case in cases if case[2] == longest}
        like = triton.like(triton.capability())
        for (score, head_dim, _), tiles in best.items():
            for name, sizes in zip(("forward", "queries", "keys"), tiles):
                print(f"{(name, like, score, head_dim)}: {sizes},")
        return
    entries = dict(table.TABLE)
    for score, head_dim, tokens in cases:
        entries[device_kind(), score, head_dim, tokens] = choose(language, score, head_dim, tokens)
    write(entries)
    print(Path(table.__file__).read_text())


if __name__ == "__main__":
    main()
