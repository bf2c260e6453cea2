"""Generation against full forward passes: greedy, sampled, compiled once."""

import functools
import importlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twomamba_jax import Execution, LanguageModel, ModelConfig, generate, parse_pattern


@functools.cache
def model_and_params(pattern, vocab_size=23, **execution):
    """A model with weights large enough that its choices are clear."""
    mixers = parse_pattern(pattern, 3)
    config = ModelConfig(
        vocab_size=vocab_size, d_model=16, num_layers=3, num_heads=2, head_dim=8, mlp_dim=24, mixers=mixers
    )
    model = LanguageModel(config, Execution(**execution))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: 4 * x, nn.unbox(params))


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass():
    """By induction over the tokens: each is the argmax after those before it, all read in one pass without a cache."""
    model, params = model_and_params("softmax,2mamba,mamba2")
    prompts = jax.random.randint(jax.random.key(1), (3, 5), 0, 23)
    new = generate(model, params, prompts, max_new_tokens=12)
    assert (new.shape, new.dtype) == ((3, 12), jnp.int32)
    assert len({tuple(row) for row in new.tolist()}) == 3

    logits = np.asarray(full_logits(model, params, jnp.concatenate([prompts, new], axis=1)))[:, 4:-1]
    np.testing.assert_array_equal(new, logits.argmax(axis=-1))
    best = np.sort(logits, axis=-1)
    assert (best[..., -1] - best[..., -2]).min() > 1e-4  # no tie that rounding could decide


@pytest.fixture
def caches(monkeypatch):
    """The empty caches that `generate` starts from: one for each time that it is traced."""
    module, made = importlib.import_module("twomamba_jax.generate"), []

    def init_cache(*args, **options):
        made.append(original(*args, **options))
        return made[-1]

    original = module.init_cache
    monkeypatch.setattr(module, "init_cache", init_cache)
    return made


def test_cache_is_as_narrow_as_the_model(caches):
    model, params = model_and_params("softmax,2mamba*", dtype=jnp.bfloat16)
    new = generate(model, params, jnp.zeros((2, 1), jnp.int32), max_new_tokens=3)
    assert new.shape == (2, 3)
    assert ((new >= 0) & (new < 23)).all()
    softmax, squared = caches[0].layers
    assert softmax.state.keys.dtype == squared.convolution.q.dtype == jnp.bfloat16
    assert squared.state.kv.dtype == jnp.float32


def test_samples_have_the_models_frequencies():
    """Two tokens after one prompt in 8192 rows: 25 pairs, each as often as p(first) p(second | first) says.

    At a temperature of 2. A step that reused the first one's key, say, would draw pairs that depend on each other.
    """
    model, params = model_and_params("2mamba", vocab_size=5)
    rows, temperature = 8192, 2.0
    prompts = jnp.tile(jnp.array([[3, 1]]), (rows, 1))
    new = generate(model, params, prompts, max_new_tokens=2, temperature=temperature, rng=jax.random.key(2))
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.asarray(new).T), 1)

    every = jnp.concatenate([prompts[:5], jnp.arange(5)[:, None]], axis=1)
    p = np.asarray(jax.nn.softmax(full_logits(model, params, every) / temperature, axis=-1))
    expected = p[0, 1][:, None] * p[:, 2]
    assert expected.max() < 0.5
    # Chi-square with 24 degrees of freedom: mean 24, standard deviation 7; 5 of these allowed.
    assert (expected * rows).min() > 5
    assert ((counts - expected * rows) ** 2 / (expected * rows)).sum() < 24 + 5 * 7


def test_one_compilation_serves_every_temperature_key_and_parameter(caches):
    """The same key gives the same tokens, another key others; greedy needs none."""
    model, params = model_and_params("linear")
    prompts = jnp.array([[1, 2, 3]])

    def sample(model=model, params=params, temperature=1.0, seed=0, max_new_tokens=16):
        rng = jax.random.key(seed)
        new = generate(model, params, prompts, max_new_tokens=max_new_tokens, temperature=temperature, rng=rng)
        return new.tolist()

    first = sample()
    assert sample() == first
    assert sample(seed=1) != first
    greedy = sample(temperature=0.0)
    assert greedy == sample(temperature=0.0, seed=1) == generate(model, params, prompts, max_new_tokens=16).tolist()
    assert sample(params=jax.tree.map(lambda x: -x, params), temperature=0.0) != greedy
    assert sample(model=LanguageModel(model.config)) == first  # an equal model is the same
    assert len(caches) == 1
    sample(max_new_tokens=1)
    assert len(caches) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros((2, 0), jnp.int32)}, "tokens must be prompts [B, T] with T >= 1, got shape (2, 0)"),
        ({"tokens": jnp.zeros(3, jnp.int32)}, "tokens must be prompts [B, T] with T >= 1, got shape (3,)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": 1.0}, "temperature=1.0 samples and needs a random key: pass rng=jax.random.key(seed)"),
    ],
    ids=str,
)
def test_bad_calls_are_refused(change, message):
    arguments = {"tokens": jnp.zeros((1, 2), jnp.int32), "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(None, None, arguments.pop("tokens"), **arguments)
