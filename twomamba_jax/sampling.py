"""The choice of the next token from its logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.ops.integers import Integer, checked_integer
from twomamba_jax.ops.known import known
from twomamba_jax.shapes import AnyArray, Array, Float, Int

Number = float | np.number | AnyArray  # one for all rows; JAX may trace it


class Sampling(NamedTuple):
    """How tokens are chosen: from softmax(logits / temperature), cut to the likeliest ones and renormalised.

    `temperature` 0 takes the likeliest token. `top_k` keeps so many tokens; `top_p` the fewest whose probabilities
    (after `top_k`) sum to at least `top_p`. None: no cut.

    Examples:
      >>> sampling = Sampling(temperature=0.8)
      >>> start = prefill(model, params, tokens, init_cache(config, batch=1, max_length=9))
      >>> generation, _ = decode(model, params, start, 5, sampling=sampling)
    """

    temperature: Number = 0.0
    top_k: Integer | None = None
    top_p: Number | None = None


GREEDY = Sampling()


def check_sampling(sampling: Sampling, vocab_size: int) -> Sampling:
    """The sampling with Python's numbers where values are known, which inside `jax.jit` they may not be.

    Raises ValueError for what is no single number, a temperature below 0, a `top_k` outside [1, vocab_size], or a
    `top_p` outside (0, 1].
    """
    temperature = _number("temperature", sampling.temperature)
    if known(temperature) and not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    top_k = checked_integer("top_k", sampling.top_k, or_none=True)
    if top_k is not None and top_k > vocab_size:
        raise ValueError(f"top_k={top_k} must be an integer from 1 to the vocabulary's {vocab_size}, or None")
    top_p = None if sampling.top_p is None else _number("top_p", sampling.top_p)
    if top_p is not None and known(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None")
    return Sampling(temperature, top_k, top_p)


def _number(name: str, value) -> float | jax.Array:
    """`value` as Python's float, or as it is where JAX traces it. Raises ValueError for anything but one number."""
    try:
        if np.shape(value) == ():
            return value if isinstance(value, jax.core.Tracer) else float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}={value!r} must be one number for all rows")


def sample(keys: jax.Array, logits: Float[Array, "B vocab"], temperature, top_k: int | None, top_p) -> Int[Array, "B"]:
    """One token per row, int32, from the row's own logits and key `keys [B]` alone."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    if top_k is not None:
        smallest = jax.lax.top_k(scaled, top_k)[0][..., -1:]
        scaled = jnp.where(scaled < smallest, -jnp.inf, scaled)
    if top_p is not None:
        order = jnp.argsort(-scaled, axis=-1)
        p = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
        dropped = jnp.cumsum(p, axis=-1) - p >= top_p  # the likelier ones suffice
        rank = jnp.argsort(order, axis=-1)
        scaled = jnp.where(jnp.take_along_axis(dropped, rank, axis=-1), -jnp.inf, scaled)
    sampled = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(temperature > 0, sampled, logits.argmax(-1)).astype(jnp.int32)
