"""The state of the squared score as its kernels keep it: kv in tiles of `layout`, the normaliser as a matrix."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunked.layout import multiplicity, pack, pack_normalizer, unpack, unpack_normalizer
from pallas_kernels.chunked.stages import StateArrays, States


def pack_state(state: StateArrays):
    """Tiles [B, G, 40, 64, V], and the normaliser as a matrix [B, G, 1, 64, 64]."""
    return pack(state.kv), pack_normalizer(state.key_sum)[:, :, None]


def unpack_state(kv, matrix) -> StateArrays:
    """The inverse of `pack_state`."""
    return StateArrays(unpack(kv), unpack_normalizer(matrix[:, :, 0]))


def inner(states: States, dstates: States, with_normalizer: bool):
    """<S, dS> of every chunk [B, G, N] float32."""
    total = jnp.einsum(
        "bgntrv,bgntrv,tr->bgn", states.kv, dstates.kv, multiplicity(), preferred_element_type=jnp.float32
    )
    if with_normalizer:
        total = total + (states.normalizer * dstates.normalizer).sum((-3, -2, -1))
    return total


def scaled(w, weight):
    """The vectors w [B, T, heads, V] times their weights [B, heads, T] or, if None, 1; in w's dtype."""
    if weight is None:
        return w
    return (w.astype(jnp.float32) * jnp.moveaxis(weight, 1, 2)[..., None]).astype(w.dtype)


def two_parts(matrix):
    """[B, G, N, 1, 64, 64] float32 as a sum of two bfloat16 matrices, [B, G, N, 2, 64, 64].

    The compiler may drop conversions there and back, not `reduce_precision`.
    """
    high = jax.lax.reduce_precision(matrix, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high.astype(jnp.bfloat16), (matrix - high).astype(jnp.bfloat16)], axis=3)
