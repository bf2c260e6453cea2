"""The cache of a model: its shape and size, ragged prompts, packed prompts, and what happens when it is full."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import model_of

from twomamba_jax import (
    VARIANTS,
    FiniteState,
    KeyValueCache,
    Mixer,
    decay_attention,
    init_cache,
    init_state,
    state_bytes,
)
from twomamba_jax.layers.cache import init_mixer_cache

TOKENS = jax.random.randint(jax.random.key(0), (3, 11), 0, 23)


@functools.partial(jax.jit, static_argnums=0)
def init(model):
    return nn.unbox(model.init(jax.random.key(1), TOKENS)["params"])


@functools.partial(jax.jit, static_argnums=0)
def full(model, params, tokens):
    return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens, cache, **rows):
    return model.apply({"params": params}, tokens, cache=cache, **rows)


@functools.partial(jax.jit, static_argnums=0)
def decode(model, params, tokens, cache):
    """Single steps over tokens [B, N]: the cache is the carry of a scan."""

    def step(cache, token):
        logits, cache = model.apply({"params": params}, token[:, None], cache=cache)
        return cache, logits[:, 0]

    cache, logits = jax.lax.scan(step, cache, tokens.T)
    return jnp.moveaxis(logits, 0, 1), cache


def assert_close(actual, expected):
    """Within 32 times float32's epsilon times the largest logit: see test_model_variants.py."""
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(actual) - np.asarray(expected)).max() / (np.finfo(np.float32).eps * scale)
    assert error <= 32


def test_empty_cache():
    """One entry a run, a leading axis of its layers, states of 0 and key/value slots of weight 0."""
    config = model_of("softmax,2mamba*,conv4", 4).config
    cache = init_cache(config, 3, 10, dtype=jnp.bfloat16)
    softmax, squared, linear = cache.layers
    assert isinstance(softmax.state, KeyValueCache)
    assert isinstance(squared.state, FiniteState)
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), cache)
    assert shapes.position == ((3,), "int32")
    assert shapes.layers[0].state == KeyValueCache(
        ((1, 3, 10, 2, 8), "bfloat16"), ((1, 3, 10, 2, 8), "bfloat16"), ((1, 3, 10, 2), "float32"), ((1, 3), "int32")
    )
    assert softmax.convolution is None
    assert shapes.layers[1].state == FiniteState(((2, 3, 2, 36, 8), "float32"), ((2, 3, 2, 36), "float32"))
    assert shapes.layers[1].convolution == (
        ((2, 3, 1, 4, 8), "bfloat16"), ((2, 3, 1, 2, 8), "bfloat16"), ((2, 3, 1, 2, 8), "bfloat16")
    )  # fmt: skip
    assert linear.state.kv.shape == (1, 3, 2, 8, 8)
    assert linear.convolution.q.shape == (1, 3, 3, 4, 8)
    np.testing.assert_array_equal(softmax.state.log_weights, -np.inf)
    for x in jax.tree.leaves((softmax.state._replace(log_weights=0), squared, linear, cache.position)):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize(("batch", "max_length"), [(0, 4), (2, 0)])
def test_cache_of_nothing_is_refused(batch, max_length):
    with pytest.raises(ValueError, match=r"(batch|max_length)=0 must be at least 1"):
        init_cache(model_of("2mamba").config, batch, max_length)


def test_size_of_the_cache():
    """2mamba's does not depend on the length it will reach; softmax's is proportional to it."""

    def size(pattern, max_length):
        config = model_of(pattern, 4).config
        return state_bytes(jax.eval_shape(lambda: init_cache(config, 2, max_length)))

    features, positions = 8 * 9 // 2, 2 * 4
    state = features * 8 + features  # kv, key_sum
    inputs = (4 + 2 + 2) * 8
    assert size("2mamba", 1) == size("2mamba", 1_000_000) == 4 * 2 * 4 * (2 * state + inputs) + positions
    a_token = 4 * 2 * 4 * 2 * (8 + 8 + 1)  # layers, rows, bytes, kv heads; key, value, log weight
    assert size("softmax", 500) - size("softmax", 100) == 400 * a_token


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("size", [1, 7])
def test_a_call_keeps_the_structure_of_the_cache(dtype, size):
    model = model_of("softmax,2mamba,2mamba-e,mamba2", 4, dtype=dtype)
    cache = init_cache(model.config, 3, 9, dtype=dtype)
    tokens = jax.ShapeDtypeStruct((3, size), jnp.int32)
    for rows in ({}, {"lengths": jnp.ones(3, jnp.int32)}, {"segment_ids": jnp.zeros((3, size), jnp.int32)}):
        call = functools.partial(model.init_with_output, jax.random.key(0))
        (_, after), _ = jax.eval_shape(call, tokens, cache=cache, **rows)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
        assert jax.tree.structure(after) == jax.tree.structure(cache)


@pytest.mark.parametrize("pattern", ["mamba2", "2mamba-e", "softmax"])
def test_steps_from_an_empty_cache(pattern):
    """No prefill: the first token is a step like any other."""
    model = model_of(pattern)
    params = init(model)
    logits, cache = decode(model, params, TOKENS, init_cache(model.config, *TOKENS.shape))
    assert_close(logits, full(model, params, TOKENS))
    np.testing.assert_array_equal(cache.position, 11)


@pytest.mark.parametrize("pattern", ["2mamba", "mamba2", "2mamba-e", "softmax"])
def test_ragged_prompts_continue_like_each_row_alone(pattern):
    """Right-padded prompts, one of a single token (shorter than the convolution's window), then four steps.

    The padding is tokens like any other, so that reading it would show.
    """
    model, lengths = model_of(pattern), np.array([7, 1, 4])
    params = init(model)
    prompts, new = TOKENS[:, :7], TOKENS[:, 7:]
    prefill, cache = read(model, params, prompts, init_cache(model.config, 3, 11), lengths=jnp.asarray(lengths))
    np.testing.assert_array_equal(cache.position, lengths)
    steps, cache = decode(model, params, new, cache)
    np.testing.assert_array_equal(cache.position, lengths + 4)

    # Each row alone, without its padding; what follows it to make the rows equally long is out of its sight.
    rows = np.stack([np.r_[prompts[b, :n], new[b], prompts[b, n:]] for b, n in enumerate(lengths)])
    expected = full(model, params, rows)
    for b, n in enumerate(lengths):
        assert_close(prefill[b, :n], expected[b, :n])
        assert_close(steps[b], expected[b, n : n + 4])


@pytest.mark.parametrize("pattern", ["2mamba", "mamba2", "softmax"])
def test_packed_prompt_continues_its_last_document(pattern):
    """With padding after it in one row; the other row ends in a document shorter than the convolution's window."""
    model, lengths = model_of(pattern), jnp.array([5, 7])
    params = init(model)
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 2]])
    cache = init_cache(model.config, 2, 11)
    _, cache = read(model, params, TOKENS[:2, :7], cache, segment_ids=segment_ids, lengths=lengths)
    steps, _ = decode(model, params, TOKENS[:2, 7:], cache)
    for b, start, end in ((0, 2, 5), (1, 6, 7)):
        row = jnp.concatenate([TOKENS[b, start:end], TOKENS[b, 7:], TOKENS[b, :6]])[None, :11]
        assert_close(steps[b], full(model, params, row)[0, end - start : end - start + 4])


def test_rows_that_overflow_are_nan_and_no_others():
    """Inside jit, where a full key/value cache cannot raise. Row 0 is full after its prompt, row 1 one step later."""
    model = model_of("2mamba,softmax", 2)
    params = init(model)
    prompts, new = TOKENS[:, :6], TOKENS[:, 6:8]
    cache = init_cache(model.config, 3, 6)
    _, cache = read(model, params, prompts, cache, lengths=jnp.array([6, 5, 2]))
    logits, _ = decode(model, params, new, cache)
    assert np.isnan(logits).all(axis=-1).tolist() == [[True, True], [False, True], [False, False]]
    assert np.isfinite(logits[1, 0]).all()
    row = jnp.concatenate([prompts[2, :2], new[2]])[None]
    assert_close(logits[2], full(model, params, row)[0, 2:])

    both, _ = read(model, params, new, cache)  # two tokens in one call: no part of row 1 is right
    assert np.isnan(both).all(axis=(1, 2)).tolist() == [True, True, False]


def test_full_cache_raises_outside_jit():
    config = model_of("softmax").config
    softmax, x = VARIANTS["softmax"].mixer, jnp.zeros((1, 4, 32))
    cache = init_mixer_cache(softmax, config, 1, 3, jnp.float32)
    message = "the key/value cache holds 3 tokens and would need 4"
    with pytest.raises(ValueError, match=message):
        Mixer(softmax, 4, 8, 2).init_with_output(jax.random.key(0), x, cache=cache)
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        decay_attention(q, q, q, score="exp", initial_state=init_state("exp", 1, 2, 8, 8, capacity=3))
