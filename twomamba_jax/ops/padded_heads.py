"""Heads whose keys and values differ in size, for kernels that have K = V: the smaller is padded with zeros.

Zeros change no <q, k>, and add outputs that are 0.
"""

import functools

import jax.numpy as jnp
import numpy as np

from twomamba_jax.ops.score import SCORES, Score, num_features
from twomamba_jax.ops.state import FiniteState


def pad_arrays(q, k, v):
    """q, k and v [B, T, heads, dim] with the larger of K and V."""
    size = max(k.shape[-1], v.shape[-1])
    return tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, size - x.shape[-1])]) for x in (q, k, v))


def pad_state(score: Score, head_dim: int, state: FiniteState) -> FiniteState:
    """The state of keys of `head_dim` as one of padded keys and values."""
    value_dim = state.kv.shape[-1]
    size, index = max(head_dim, value_dim), _feature_index(score, head_dim, max(head_dim, value_dim))

    def place(x):
        return jnp.zeros((*x.shape[:2], num_features(score, size), *x.shape[3:]), x.dtype).at[:, :, index].set(x)

    kv = jnp.pad(state.kv, [(0, 0)] * 3 + [(0, size - value_dim)])
    return FiniteState(place(kv), place(state.key_sum))


def cut_state(score: Score, head_dim: int, value_dim: int, state: FiniteState) -> FiniteState:
    """The inverse of `pad_state`."""
    index = _feature_index(score, head_dim, max(head_dim, value_dim))
    return FiniteState(state.kv[:, :, index, :value_dim], state.key_sum[:, :, index])


@functools.cache
def _feature_index(score: Score, head_dim: int, padded_dim: int) -> np.ndarray:
    """[D] where each feature of a key of `head_dim` is among those of the key padded to `padded_dim`."""
    entries = SCORES[score].finite.entries
    number = {product: index for index, product in enumerate(entries(padded_dim))}
    return np.array([number[product] for product in entries(head_dim)])
