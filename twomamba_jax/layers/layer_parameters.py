"""The parameters of a model with each layer's in arrays of their own, for a loop over tokens.

A layer's part of a stack is a copy to XLA, which it would make for every token. Made before the loop and stacked inside
it, where nothing of the stack is computed because each layer takes its part back, it is made once.
"""

import operator

import jax
import jax.numpy as jnp

from twomamba_jax.config import ModelConfig


def unstack_layers(config: ModelConfig, params) -> dict:
    """The parameters of a `LanguageModel`, those of every layer run as a list of each layer's."""

    def layers(stack, count):
        return [jax.tree.map(operator.itemgetter(n), stack) for n in range(count)]

    runs = {f"layers_{index}": count for index, (_, count) in enumerate(config.layer_runs)}
    return {name: layers(x, runs[name]) if name in runs else x for name, x in params.items()}


def stack_layers(params: dict) -> dict:
    """What `unstack_layers` took apart."""
    return {
        name: jax.tree.map(lambda *layers: jnp.stack(layers), *x) if isinstance(x, list) else x
        for name, x in params.items()
    }
