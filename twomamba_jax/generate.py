"""Sampling from a language model: prefill and decode as one jitted program."""

import functools

import jax
import jax.numpy as jnp

from twomamba_jax.layers import LanguageModel, init_cache
from twomamba_jax.shapes import Array, Int, Tokens


def generate(
    model: LanguageModel,
    params,
    tokens: Tokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    rng: jax.Array | None = None,
) -> Int[Array, "B N"]:
    """Continues each row of `tokens` by `max_new_tokens` tokens.

    The prompt is read in one call (prefill), then a `lax.scan` of single tokens runs on its cache. One compilation per
    model, prompt shape and `max_new_tokens`; whatever the temperature.

    Args:
      model: the model.
      params: its parameters.
      tokens: prompts [B, T], T >= 1, all of the same length.
      max_new_tokens: N >= 1.
      temperature: 0 takes the likeliest token, above that samples from softmax(logits / temperature).
      rng: a `jax.random.key`, needed by a temperature above 0.

    Returns:
      The new tokens [B, N], int32.

    Raises:
      ValueError: an empty prompt, `max_new_tokens` below 1, a negative temperature, or one above 0 without `rng`.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be prompts [B, T] with T >= 1, got shape {tokens.shape}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be an integer of at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature={temperature} samples and needs a random key: pass rng=jax.random.key(seed)")
    rng = jax.random.key(0) if rng is None else rng
    return _generate(model, params, tokens, jnp.float32(temperature), rng, max_new_tokens)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _generate(model, params, tokens, temperature, rng, max_new_tokens):
    batch, size = tokens.shape
    cache = init_cache(model.config, batch, size + max_new_tokens, dtype=model.execution.dtype)

    def choose(logits, key):
        sampled = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1))
        return jnp.where(temperature > 0, sampled, logits.argmax(-1)).astype(jnp.int32)

    def decode(carry, key):
        token, cache = carry
        logits, cache = model.apply({"params": params}, token[:, None], cache=cache)
        token = choose(logits[:, -1], key)
        return (token, cache), token

    keys = jax.random.split(rng, max_new_tokens)
    logits, cache = model.apply({"params": params}, tokens, cache=cache)
    first = choose(logits[:, -1], keys[0])
    _, rest = jax.lax.scan(decode, (first, cache), keys[1:])
    return jnp.concatenate([first[None], rest]).T
