"""The small model that the layers' tests share, and the smallest that the training step takes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax import Execution, LanguageModel, ModelConfig, parse_pattern

SIZES = {"vocab_size": 23, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48}


def config_of(pattern, num_layers=1, **sizes):
    """Heads share keys and values, unless they share queries and keys."""
    mixers = parse_pattern(pattern, num_layers)
    if any(mixer.qk_groups for mixer in mixers):
        sizes = {"num_kv_heads": None} | sizes
    return ModelConfig(mixers=mixers, num_layers=num_layers, **SIZES | sizes)


def model_of(pattern, num_layers=1, **execution):
    return LanguageModel(config_of(pattern, num_layers), Execution(**execution))


def params_of(model, scale=0.25):
    """Random parameters, of which none is 0 or 1 as biases and scales are at first. By NumPy: nothing is compiled."""
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        is_scale = path[-1].key == "scale"
        noise = draw.normal(scale=0.25 if is_scale else scale, size=shape.shape)
        return jnp.asarray(noise + is_scale, shape.dtype)

    return jax.tree.map_with_path(leaf, _shapes(model))


@functools.cache
def _shapes(model):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), tokens)["params"]))


class Bigram(nn.Module):
    """A head alone: logits of the next token by the current one, small enough to differentiate by hand.

    The hidden state of a token is `scale` times its one-hot vector, and the head is drawn `scale` times as small.
    """

    scale: float = 1.0
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, tokens, segment_ids=None, apply_head=True):
        initializer = nn.with_logical_partitioning(nn.initializers.normal(1 / self.scale), ("embed", "vocab"))
        head, x = self.param("head", initializer, (5, 5)), self.scale * jax.nn.one_hot(tokens, 5)
        return x @ head if apply_head else x
