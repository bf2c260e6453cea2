"""The chunked kernels as programs that can be lowered and compiled without a GPU."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.chunked.attention import ChunkedAttention, StateArrays, chunked_attention
from pallas_kernels.chunked.mosaic_gpu import STAGES
from pallas_kernels.quadratic.attention import Attention
from pallas_kernels.quadratic.mosaic_gpu import KERNELS
from pallas_kernels.quadratic.programs import Program
from pallas_kernels.quadratic.tuning import tuning


def programs() -> Iterator[Program]:
    """Forward and backward of every score and head dim, with and without decay, normalisation and states."""
    for score, stages in STAGES.items():
        for dim, *has in itertools.product(stages.head_dims, *[(True, False)] * 3):
            kinds = itertools.compress(("decay", "normalize", "states"), has)
            yield _program("-".join(["chunked", score, str(dim), *kinds]), score, dim, *has)


def _program(name: str, score: str, dim: int, decay: bool, normalize: bool, states: bool) -> Program:
    batch, tokens, heads, groups = 2, 32768, 8, 4  # many pieces of work to a program
    stages = STAGES[score]
    tiles = tuning("NVIDIA H200", score, dim, stages.chunk)
    inside = Attention(KERNELS, score, normalize, dim**-0.5, 2.0**-100, tiles)
    spec = ChunkedAttention(inside, stages, final_state=states)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = [shape(batch, tokens, n, dim) for n in (heads, groups, groups, heads)]
    arguments += [shape(batch, tokens, groups, dtype=jnp.float32)] if decay else []
    features = {"linear": dim, "squared": dim * (dim + 1) // 2}[score]
    state = [shape(batch, groups, features, *values, dtype=jnp.float32) for values in ((dim,), ())]
    arguments += state if states else []

    def function(q, k, v, dy, *rest):
        rest = list(rest)
        log_decay = rest.pop(0) if decay else None
        initial = StateArrays(*rest) if states else None

        def call(q, k, v, log_decay, initial):
            return chunked_attention(spec, q, k, v, log_decay, None, initial)

        (y, final), pull = jax.vjp(call, q, k, v, log_decay, initial)
        return y, final, pull((dy, final))

    return Program(name, function, tuple(arguments))
