"""Every entry of the tuning table as a program that can be lowered and compiled without a GPU."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.quadratic.attention import Attention, attention
from pallas_kernels.quadratic.mosaic_gpu import KERNELS
from pallas_kernels.quadratic.table import TABLE
from pallas_kernels.quadratic.tuning import tuning


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays that runs kernels, and the shapes to compile it for."""

    name: str
    function: Callable
    arguments: tuple[jax.ShapeDtypeStruct, ...]


def programs() -> Iterator[Program]:
    """Forward and backward of every entry, with and without decay, segments and normalisation where they matter."""
    for device, score, head_dim, tokens in TABLE:
        for decay, segments, normalize in itertools.product((True, False), repeat=3):
            if score == "exp" and not normalize and segments:
                continue  # nothing in it that the others lack
            kinds = (("decay", decay), ("segments", segments), ("normalize", normalize))
            name = "-".join([device, score, str(head_dim), str(tokens), *(kind for kind, has in kinds if has)])
            tiles = tuning(device, score, head_dim, tokens)
            yield _program(name.replace(" ", "_"), score, head_dim, tiles, decay, segments, normalize)


def _program(name, score, head_dim, tiles, decay, segments, normalize) -> Program:
    spec = Attention(KERNELS, score, normalize, scale=head_dim**-0.5, floor=2.0**-100, tuning=tiles)
    batch, tokens, heads, kv_heads = 2, 8192, 8, 4  # many tiles to a program

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = [shape(batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arguments += [shape(batch, tokens, kv_heads, dtype=jnp.float32)] if decay else []
    arguments += [shape(batch, tokens, dtype=jnp.int32)] if segments else []

    def function(q, k, v, dy, *rest):
        rest = list(rest)
        log_decay = rest.pop(0) if decay else None
        segment = rest.pop(0) if segments else None
        y, pull = jax.vjp(lambda q, k, v, log_decay: attention(spec, q, k, v, log_decay, segment), q, k, v, log_decay)
        return y, pull(dy)

    return Program(name, function, tuple(arguments))
