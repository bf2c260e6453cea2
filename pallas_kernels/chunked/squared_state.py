"""The state of the squared score as its kernels keep it: kv in tiles of `layout`, the normaliser as a matrix."""

import jax.numpy as jnp

from pallas_kernels.chunked.layout import pack, pack_normalizer, unpack, unpack_normalizer
from pallas_kernels.chunked.stages import StateArrays


def pack_state(state: StateArrays):
    """Tiles [B, G, 40, 64, V], and the normaliser as a matrix [B, G, 1, 64, 64]."""
    return pack(state.kv), pack_normalizer(state.key_sum)[:, :, None]


def unpack_state(kv, matrix) -> StateArrays:
    """The inverse of `pack_state`."""
    return StateArrays(unpack(kv), unpack_normalizer(matrix[:, :, 0]))


def scaled(w, weight):
    """The vectors w [B, T, heads, V] times their weights [B, heads, T] or, if None, 1; in w's dtype."""
    if weight is None:
        return w
    return (w.astype(jnp.float32) * jnp.moveaxis(weight, 1, 2)[..., None]).astype(w.dtype)
