"""What a model remembers between calls: a pytree with a static shape."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.ops.feature_map import FINITE_SCORES
from twomamba_jax.ops.state import State, init_state
from twomamba_jax.shapes import Array, Float, Int


class ConvolutionInputs(NamedTuple):
    """The last W - 1 inputs of a mixer's convolutions."""

    q: Float[Array, "B W-1 H K"]
    k: Float[Array, "B W-1 G K"]
    v: Float[Array, "B W-1 G V"]


class MixerCache(NamedTuple):
    """The operation's state, and the convolution's inputs (None where the mixer has no convolution)."""

    state: State
    convolution: ConvolutionInputs | None


class Cache(NamedTuple):
    """One `MixerCache` per run of equal layers, its arrays with a leading layer axis, and the next token's position."""

    layers: tuple[MixerCache, ...]
    position: Int[Array, "B"]


def init_cache(config: ModelConfig, batch: int, max_length: int, *, dtype=jnp.float32) -> Cache:
    """The empty cache of a model.

    Args:
      config: the model's.
      batch: B.
      max_length: tokens that key/value caches can hold. Finite states ignore it: theirs is a constant size.
      dtype: of cached keys, values and convolution inputs: the `Execution.dtype` of the model. States and normalisers
        are float32 or wider.

    Raises:
      ValueError: batch or max_length below 1.
    """
    for name, value in (("batch", batch), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")

    def stacked(mixer: MixerConfig, count: int) -> MixerCache:
        one = init_mixer_cache(mixer, config, batch, max_length, dtype)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), one)

    layers = tuple(stacked(mixer, count) for mixer, count in config.runs)
    return Cache(layers, jnp.zeros((batch,), jnp.int32))


def init_mixer_cache(mixer: MixerConfig, config: ModelConfig, batch: int, max_length: int, dtype) -> MixerCache:
    """The empty cache of one layer."""
    capacity = None if mixer.score in FINITE_SCORES else max_length
    size, kv_heads = config.head_dim, config.kv_heads
    state = init_state(mixer.score, batch, kv_heads, size, size, capacity=capacity, dtype=dtype)
    if mixer.conv_width == 1:
        return MixerCache(state, None)

    def inputs(heads):
        return jnp.zeros((batch, mixer.conv_width - 1, heads, size), dtype)

    return MixerCache(state, ConvolutionInputs(inputs(config.num_heads), inputs(kv_heads), inputs(kv_heads)))
