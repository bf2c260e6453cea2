"""The chunked kernels as programs that can be lowered and compiled without a GPU."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.chunked.attention import ChunkedAttention, StateArrays, chunked_attention
from pallas_kernels.quadratic.attention import Attention
from pallas_kernels.quadratic.programs import Program
from pallas_kernels.quadratic.tuning import tuning


def programs() -> Iterator[Program]:
    """Forward and backward, with and without decay, normalisation and states."""
    for decay, normalize, states in itertools.product((True, False), repeat=3):
        kinds = (("decay", decay), ("normalize", normalize), ("states", states))
        yield _program("-".join(["chunked", *(kind for kind, has in kinds if has)]), decay, normalize, states)


def _program(name: str, decay: bool, normalize: bool, states: bool) -> Program:
    batch, tokens, heads, groups, dim = 2, 32768, 8, 4, 64  # many pieces of work to a program
    inside = Attention("squared", normalize, dim**-0.5, 2.0**-100, tuning("NVIDIA H200", "squared", dim, 1024))
    spec = ChunkedAttention(inside, final_state=states)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = [shape(batch, tokens, n, dim) for n in (heads, groups, groups, heads)]
    arguments += [shape(batch, tokens, groups, dtype=jnp.float32)] if decay else []
    features = dim * (dim + 1) // 2
    state_shapes = (batch, groups, features, dim), (batch, groups, features)
    arguments += [shape(*sizes, dtype=jnp.float32) for sizes in state_shapes] if states else []

    def function(q, k, v, dy, *rest):
        rest = list(rest)
        log_decay = rest.pop(0) if decay else None
        initial = StateArrays(*rest) if states else None

        def call(q, k, v, log_decay, initial):
            return chunked_attention(spec, q, k, v, log_decay, None, initial)

        (y, final), pull = jax.vjp(call, q, k, v, log_decay, initial)
        return y, final, pull((dy, final))

    return Program(name, function, tuple(arguments))
