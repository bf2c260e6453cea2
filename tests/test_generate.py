"""Generation against full forward passes: greedy, sampled, compiled once."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.models import params_of

from twomamba_jax import Execution, LanguageModel, ModelConfig, generate, init_cache, parse_pattern
from twomamba_jax.generation import decode, decode_loop, prefill, prefill_pieces, seed
from twomamba_jax.sampling import Sampling, sample

PATTERN = "softmax,2mamba"  # a cache of each kind
# What the loop over tokens does is the same for all models: where no more is looked at, the one that compiles fastest,
# and where rows fold at different steps, the same of those that fold.
KEEPING, FOLDING = (PATTERN, PATTERN) if EXHAUSTIVE else ("softmax", "linear")


@functools.cache
def model_and_params(pattern, vocab_size=23, num_layers=None, **execution):
    """A model with weights large enough that its choices are clear; a layer for each entry of the pattern."""
    num_layers = num_layers or len(pattern.split(","))
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=16,
        num_layers=num_layers,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        mixers=parse_pattern(pattern, num_layers),
    )
    model = LanguageModel(config, Execution(**execution))
    return model, params_of(model, scale=1.0)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)


@pytest.mark.quick
def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass():
    """By induction over the tokens: each is the argmax after those before it, all read in one pass without a cache."""
    model, params = model_and_params(PATTERN)
    prompts = np.random.default_rng(1).integers(23, size=(3, 5))
    new = generate(model, params, prompts, max_new_tokens=12, fold_size=3).tokens
    assert (new.shape, new.dtype) == ((3, 12), jnp.int32)
    assert len({tuple(row) for row in new.tolist()}) == 3

    logits = np.asarray(full_logits(model, params, np.concatenate([prompts, new], axis=1)))[:, 4:-1]
    np.testing.assert_array_equal(new, logits.argmax(axis=-1))
    best = np.sort(logits, axis=-1)
    assert (best[..., -1] - best[..., -2]).min() > 1e-4  # no tie that rounding could decide


def test_samples_have_the_models_frequencies():
    """Two tokens after one prompt in 8192 rows: 25 pairs, each as often as p(first) p(second | first) says.

    At a temperature of 3. A step that reused the first one's key, say, would draw pairs that depend on each other.
    """
    model, params = model_and_params(KEEPING, vocab_size=5)
    rows, temperature = 8192, 3.0
    prompts = np.tile(np.array([[3, 1]]), (rows, 1))
    new = generate(model, params, prompts, max_new_tokens=2, temperature=temperature, rng=jax.random.key(2)).tokens
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.asarray(new).T), 1)

    every = np.concatenate([prompts[:5], np.arange(5)[:, None]], axis=1)
    p = np.asarray(jax.nn.softmax(full_logits(model, params, every) / temperature, axis=-1))
    expected = p[0, 1][:, None] * p[:, 2]
    assert expected.max() < 0.5
    # Chi-square with 24 degrees of freedom: mean 24, standard deviation 7; 5 of these allowed.
    assert (expected * rows).min() > 5
    assert ((counts - expected * rows) ** 2 / (expected * rows)).sum() < 24 + 5 * 7


def test_a_generation_is_one_compiled_loop():
    """Whatever the temperature, key, parameters and stop tokens; no token of it goes through the host."""
    model, params = model_and_params(KEEPING)
    prompts = np.array([[1, 2, 3]])

    def sample(model=model, params=params, temperature=1.0, seed=0, **options):
        options = {"max_new_tokens": 16, "rng": jax.random.key(seed)} | options
        return generate(model, params, prompts, temperature=temperature, **options).tokens.tolist()

    first, size = sample(), decode_loop._cache_size()
    start = prefill(model, params, prompts, init_cache(model.config, 1, 19))
    text = decode_loop.lower(model, params, start, 16, 1.0, None, None, jnp.zeros(0, jnp.int32), ()).as_text()
    assert "callback" not in text
    assert sample() == first
    assert sample(seed=1) != first
    greedy = sample(temperature=0.0)
    assert greedy == sample(temperature=0.0, seed=1)
    assert sample(params=jax.tree.map(lambda x: -x, params), temperature=0.0) != greedy
    assert sample(model=LanguageModel(model.config)) == first  # an equal model is the same
    assert decode_loop._cache_size() == size
    with nn.logical_axis_rules((("embed", None),)):  # other rules are another program, of the prompt too
        read = prefill_pieces._cache_size()
        assert sample() == first
        assert (decode_loop._cache_size(), prefill_pieces._cache_size()) == (size + 1, read + 1)


def test_layers_one_after_the_other_take_their_parameters_apart_once():
    """No stack of parameters goes through the lowered loop over tokens: each layer's do, where a loop has the stack.

    That logits are those of the layers in a loop is for train/test_layer_loop.py.
    """
    found = {}
    for scan_layers in (False, True):
        model, params = model_and_params("softmax", num_layers=3, scan_layers=scan_layers)
        tokens, cache = np.array([[1, 2, 3]]), init_cache(model.config, 1, 19, fold_size=3)
        start = jax.eval_shape(functools.partial(prefill, model), params, tokens, cache)
        text = decode_loop.lower(model, params, start, 16, 0.0, None, None, jnp.zeros(0, jnp.int32), ()).as_text()
        loops = "".join(line for line in text.splitlines() if "stablehlo.while" in line)
        shapes = [f"<{shape}xf32>" in loops for shape in ("3x16x24", "3x24x16", "16x24", "24x16")]
        found[scan_layers] = shapes
    assert found == {False: [False, False, True, True], True: [True, True, False, False]}


def test_rows_do_not_feel_each_other():
    """Ragged prompts, several samples, stop tokens, pieces of a prompt: each row is what it is alone."""
    model, params = model_and_params(FOLDING)
    prompts = np.random.default_rng(1).integers(23, size=(3, 11))
    lengths, keys = np.array([11, 2, 7]), jax.random.split(jax.random.key(5), 6)
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 9, "top_p": 0.9, "fold_size": 3}
    options |= {"lengths": lengths, "num_samples": 2, "rng": keys}
    every = generate(model, params, prompts, stop_tokens=[23], **options)  # no token: the program is the same
    assert len({tuple(row) for row in every.tokens.tolist()}) == 6
    stop = int(every.tokens[2, 4])
    options |= {"stop_tokens": [stop]}
    for prefill_size in (None, 4) if EXHAUSTIVE else (4,):
        stopped = generate(model, params, prompts, prefill_size=prefill_size, **options)
        for row, (want, got, count) in enumerate(zip(*map(np.asarray, (every.tokens, *stopped)))):
            (hits,) = np.nonzero(want == stop)
            assert count == (hits[0] + 1 if hits.size else 20), row
            np.testing.assert_array_equal(got[:count], want[:count])
            assert not got[count:].any()
    prompts[0] = 22 - prompts[0]
    alone = generate(model, params, prompts, **options)
    np.testing.assert_array_equal(alone.tokens[2:], stopped.tokens[2:])


@exhaustive("tests/layers/test_cache.py: a prompt in pieces, and single steps after it")
def test_a_generation_in_pieces_is_the_generation_in_one():
    """With parameters that are bound to a device, as a checkpoint's are: all pieces are one compiled program."""
    model, params = model_and_params(KEEPING)
    params = jax.device_put(params, jax.devices()[0])
    prompts, sampling = np.array([[1, 2, 3], [4, 5, 6]]), Sampling(temperature=1.0)

    def start():
        return seed(prefill(model, params, prompts, init_cache(model.config, 2, 15, fold_size=2)), jax.random.key(0))

    size = decode_loop._cache_size()
    whole, _ = decode(model, params, start(), 12, sampling=sampling)
    state, pieces = start(), []
    for _ in range(3):
        piece, state = decode(model, params, state, 4, sampling=sampling)
        pieces.append(piece.tokens)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.tokens)
    assert decode_loop._cache_size() == size + 2


def test_top_k_and_top_p_keep_the_likeliest():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        drawn = sample(keys, jnp.tile(logits, (4000, 1)), **options)
        return np.bincount(drawn, minlength=5) / 4000

    for options, kept in (
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_k": 4, "top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ):
        want = np.zeros(5)
        want[kept] = jnp.exp(logits)[jnp.array(kept)]
        got = frequencies(**options)
        assert not got[want == 0].any(), options
        np.testing.assert_allclose(got, want / want.sum(), atol=0.04)  # five standard deviations of the likeliest
    assert frequencies(temperature=0.0)[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 0), np.int32)}, "tokens must be integers [B, T] with T >= 1, got"),
        ({"tokens": np.zeros(3, np.int32)}, "tokens must be integers [B, T] with T >= 1, got int32 (3,)"),
        ({"lengths": np.array([3])}, "lengths=[3] must be from 1 to the 2 tokens of a row"),
        ({"lengths": np.array([1, 2])}, "lengths must have shape (1,), got (2,)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of at least 1"),
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": 1.0}, "temperature=1.0 samples and needs a random key: pass rng=jax.random.key(seed)"),
        ({"top_k": 24}, "top_k=24 must be an integer from 1 to the vocabulary's 23, or None"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1, or None"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1, or None"),
        ({"rng": jax.random.split(jax.random.key(0), 3)}, "rng must be one key, or 1 keys, one for each row"),
    ],
    ids=str,
)
def test_bad_calls_are_refused(change, message):
    model, params = model_and_params("linear")
    arguments = {"tokens": jnp.zeros((1, 2), jnp.int32), "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, params, arguments.pop("tokens"), **arguments)
