"""The cache of a model: its shape and size, ragged prompts, packed prompts, and what happens when it is full."""

import functools
import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE
from support.models import config_of, model_of, params_of

from twomamba_jax import (
    VARIANTS,
    KeyValueCache,
    Mixer,
    cache_bytes,
    decay_attention,
    init_cache,
    init_state,
    roll_back,
)
from twomamba_jax.layers.cache import init_mixer_cache
from twomamba_jax.ops.decoding.recurrent_cache import RecurrentCache
from twomamba_jax.ops.state import FiniteState

TOKENS = np.random.default_rng(0).integers(23, size=(3, 12))


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
    """One entry a run, a leading axis of its layers, zeros everywhere."""
    config = model_of("softmax,2mamba*,conv4", 4).config
    cache = init_cache(config, 3, 10, fold_size=5, dtype=jnp.bfloat16, state_dtype=jnp.bfloat16)
    softmax, squared, linear = cache.layers
    assert isinstance(softmax.attention, KeyValueCache)
    assert isinstance(squared.attention, RecurrentCache)
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), cache)
    assert shapes.position == ((3,), "int32")
    heads, length = ((1, 3, 2, 10, 8), "bfloat16"), ((1, 3), "int32")
    assert shapes.layers[0].attention == KeyValueCache(heads, heads, None, length, length)
    assert softmax.convolution is None
    ring, length = ((2, 3, 2, 10, 8), "bfloat16"), ((2, 3), "int32")
    assert shapes.layers[1].attention == RecurrentCache(
        FiniteState(((2, 3, 2, 36, 8), "bfloat16"), ((2, 3, 2, 36), "float32")),
        None, ring, ring, ((2, 3, 2, 10), "float32"), length, length,
    )  # fmt: skip
    assert shapes.layers[1].convolution == (
        ((2, 3, 1, 4, 8), "bfloat16"), ((2, 3, 1, 2, 8), "bfloat16"), ((2, 3, 1, 2, 8), "bfloat16")
    )  # fmt: skip
    assert linear.attention.state.kv.shape == (1, 3, 2, 8, 8)
    assert linear.convolution.q.shape == (1, 3, 3, 4, 8)
    for x in jax.tree.leaves(cache):
        np.testing.assert_array_equal(x, 0)


def test_convolution_inputs_of_shared_queries_and_keys_are_kept_once():
    """The state is each head's own, of K = 128 by V = 8; so are the keys in the ring."""
    cache = init_cache(model_of("mamba2-released").config, 3, 10, fold_size=5).layers[0]
    assert cache.attention.state.kv.shape == (1, 3, 4, 128, 8)
    assert cache.attention.keys.shape == (1, 3, 4, 10, 128)
    assert [x.shape for x in cache.convolution] == [(1, 3, 3, 1, 128), (1, 3, 3, 1, 128), (1, 3, 3, 4, 8)]


@pytest.mark.parametrize(("batch", "max_length"), [(0, 4), (2, 0)])
def test_cache_of_nothing_is_refused(batch, max_length):
    with pytest.raises(ValueError, match=r"(batch|max_length)=0 must be an integer of at least 1"):
        init_cache(model_of("2mamba").config, batch, max_length)


def test_size_of_the_cache():
    """2mamba's does not depend on the length it will reach; softmax's is proportional to it."""

    def size(pattern, max_length, **options):
        return cache_bytes(model_of(pattern, 4).config, 2, max_length, **options)

    features, position, a_token = 8 * 9 // 2, 2 * 4, 2 * (8 + 8 + 1)  # kv heads; key, value, log decay
    state, inputs, counters = 2 * (features * 8 + features), (4 + 2 + 2) * 8, 2
    per_row = state + inputs + counters
    assert size("2mamba", 1, fold_size=3) == size("2mamba", 1_000_000, fold_size=3)
    assert size("2mamba", 1, fold_size=3) == 4 * 2 * 4 * (per_row + 6 * a_token) + position
    kept = size("2mamba", 1, fold_size=3, rollback=True) - size("2mamba", 1, fold_size=3)
    assert kept == 4 * 2 * 4 * (state + 3 * inputs) + 2 * 4 + 4  # the state before, convolution inputs, what is left
    assert size("softmax", 500) - size("softmax", 100) == 400 * 4 * 2 * 4 * 2 * (8 + 8)


def test_crossover_with_a_key_value_cache():
    """The paper's equation 6: at equal precision 2Mamba's is as large as softmax's of 1,058 tokens, for K = V = 64."""

    def size(variant, length, **options):
        return cache_bytes(config_of(variant, head_dim=64, num_kv_heads=None), 1, length, **options)

    a_token = size("softmax", 2) - size("softmax", 1)
    ring = size("2mamba", 1, fold_size=2) - size("2mamba", 1, fold_size=1)  # two tokens, as many as for r = 1
    assert round((size("2mamba", 1, fold_size=1) - ring) / a_token) == 1058


CALLS = [("float32", 7, ["segment_ids"]), ("bfloat16", 1, ["lengths"])]
EVERY_CALL = [(*call[:2], names) for call in CALLS for names in ([], ["lengths"], ["segment_ids"])]


@pytest.mark.parametrize(("dtype", "size", "names"), EVERY_CALL if EXHAUSTIVE else CALLS, ids=str)
def test_a_call_keeps_the_structure_of_the_cache(dtype, size, names):
    model = model_of("2mamba-e,mamba2", 2, dtype=dtype)  # a cache of each kind
    cache = init_cache(model.config, 3, 9, dtype=jnp.dtype(dtype))
    rows = {"lengths": np.ones(3, np.int32), "segment_ids": np.zeros((3, size), np.int32)}
    call = functools.partial(model.init_with_output, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((3, size), jnp.int32)
    (_, after), _ = jax.eval_shape(call, tokens, cache=cache, **{name: rows[name] for name in names})
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    assert jax.tree.structure(after) == jax.tree.structure(cache)


# Every kind of cache and convolution; squared states are those of test_pieces_of_any_size_are_the_whole below and of
# test_variants.py. The tests that follow compile the same three programs of each.
CACHED = "softmax,2mamba-e"
PATTERNS = ["mamba2-released", CACHED, *(["2mamba", "2mamba-e", "softmax", "mamba2"] if EXHAUSTIVE else [])]


def stacked(pattern, **execution):
    """A layer for each entry of the pattern."""
    return model_of(pattern, len(pattern.split(",")), **execution)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_from_an_empty_cache(pattern):
    """No prefill: the first token is a step like any other. Four at a time."""
    model = stacked(pattern)
    params = params_of(model)
    cache, logits = init_cache(model.config, *TOKENS.shape), []
    for tokens in np.split(TOKENS, 3, axis=1):
        some, cache = decode(model, params, tokens, cache)
        logits.append(some)
    assert_close(np.concatenate(logits, axis=1), full(model, params, TOKENS))
    np.testing.assert_array_equal(cache.position, 12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_prompts_continue_like_each_row_alone(pattern):
    """Right-padded prompts, one of a single token (shorter than the convolution's window), then four steps.

    The padding is tokens like any other, so that reading it would show.
    """
    model, lengths = stacked(pattern), np.array([8, 1, 4])
    params = params_of(model)
    prompts, new = np.split(TOKENS, [8], axis=1)
    rows = {"lengths": lengths, "segment_ids": np.zeros((3, 8), np.int32)}
    prefill, cache = read(model, params, prompts, init_cache(model.config, 3, 12), **rows)
    np.testing.assert_array_equal(cache.position, lengths)
    steps, cache = decode(model, params, new, cache)
    np.testing.assert_array_equal(cache.position, lengths + 4)

    # Each row alone, without its padding; what follows it to make the rows equally long is out of its sight.
    rows = np.stack([np.r_[prompts[b, :n], new[b], prompts[b, n:]] for b, n in enumerate(lengths)])
    expected = full(model, params, rows)
    for b, n in enumerate(lengths):
        assert_close(prefill[b, :n], expected[b, :n])
        assert_close(steps[b], expected[b, n : n + 4])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_prompt_continues_its_last_document(pattern):
    """With padding after it in one row; another ends in a document shorter than the convolution's window."""
    model, lengths = stacked(pattern), np.array([5, 8, 8])
    params = params_of(model)
    segment_ids = np.array([[1, 1, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 2], [1, 2, 2, 1, 1, 1, 1, 1]])
    prompts, new = np.split(TOKENS, [8], axis=1)
    cache = init_cache(model.config, 3, 12)
    _, cache = read(model, params, prompts, cache, segment_ids=segment_ids, lengths=lengths)
    steps, _ = decode(model, params, new, cache)
    spans = (2, 5), (7, 8), (3, 8)
    rows = [np.r_[prompts[b, start:end], new[b], prompts[b]][:12] for b, (start, end) in enumerate(spans)]
    expected = full(model, params, np.stack(rows))
    for b, (start, end) in enumerate(spans):
        assert_close(steps[b], expected[b, end - start : end - start + 4])


def test_rows_that_overflow_are_nan_and_no_others():
    """Inside jit, where a full key/value cache cannot raise. Row 0 is full after four steps, row 1 one step later."""
    model = stacked(CACHED)
    params = params_of(model)
    prompts, new = np.split(TOKENS, [8], axis=1)
    rows = {"lengths": np.array([8, 7, 2]), "segment_ids": np.zeros((3, 8), np.int32)}
    _, cache = read(model, params, prompts, init_cache(model.config, 3, 12), **rows)
    _, cache = decode(model, params, new, cache)
    logits, _ = decode(model, params, new, cache)
    assert np.isnan(logits).all(axis=-1).tolist() == [[True] * 4, [False, True, True, True], [False] * 4]
    assert np.isfinite(logits[1, 0]).all()
    row = np.concatenate([prompts[2, :2], new[2], new[2], prompts[2, :2]])
    assert_close(logits[2], full(model, params, np.stack([row] * 3))[0, 6:10])

    rows["lengths"] = np.array([2, 2, 2])
    both, _ = read(model, params, prompts, cache, **rows)  # two tokens in one call: no part of row 1 is right
    assert np.isnan(both[:, :2]).all(axis=(1, 2)).tolist() == [True, True, False]


def test_keys_and_values_keep_their_layout():
    """Or XLA for GPUs, in a loop over tokens, would permute the axes of all of them, in a copy."""
    model = model_of("softmax,2mamba", 2)
    cache = init_cache(model.config, 3, 16)
    text = read.lower(model, params_of(model), TOKENS[:, :1], cache).as_text()
    kept = re.findall(r"@LayoutConstraint.* result_layouts = \[dense<\[(.*?)\]>.*: \(tensor<(\w+)>\)", text)
    assert kept == [("4, 3, 2, 1, 0", "1x3x2x16x8xf32")] * 2


def test_full_cache_raises_outside_jit():
    config = model_of("softmax").config
    softmax, x = VARIANTS["softmax"].mixer, jnp.zeros((1, 4, 32))
    mixer, cache = Mixer(softmax, num_heads=4, head_dim=8, num_kv_heads=2), init_mixer_cache(softmax, config, 1, 3)
    shapes = jax.eval_shape(lambda: nn.unbox(mixer.init(jax.random.key(0), x)))
    message = "the key/value cache holds 3 tokens and would need 4"
    with pytest.raises(ValueError, match=message):
        mixer.apply(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), x, cache=cache)
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        decay_attention(q, q, q, score="exp", initial_state=init_state("exp", 1, 2, 8, 8, capacity=3))


FOLD = 4


@pytest.mark.parametrize(
    "pattern",
    [
        "mamba2-released,2mamba-e",
        *(["2mamba,2mamba-e,linear", "softmax,mamba2,mamba2s"] if EXHAUSTIVE else []),
    ],
)
def test_roll_back_over_folds_leaves_no_trace(pattern):
    """A row for each number of tokens and each distance from a fold: it reads other tokens and takes them back.

    One in three is no token of the model, and leaves NaN until it is taken back. The steps after it have the bits
    of the same steps without them. Five at a time, three times: folds fall on all.
    """
    model, steps = stacked(pattern), 15
    params, back = params_of(model), jax.jit(roll_back)
    counts, lengths = np.tile(np.arange(1, FOLD + 1), FOLD), FOLD + 1 + np.repeat(np.arange(FOLD), FOLD)
    prompts, right = np.split(np.random.default_rng(0).integers(23, size=(FOLD**2, 2 * FOLD + steps)), [2 * FOLD], 1)
    wrong = np.where(np.arange(steps) % 3 == 1, 23, (right + 7) % 23)

    def step(tokens, cache, active):
        return read(model, params, tokens[:, None], cache, lengths=active.astype(np.int32))

    cache = init_cache(model.config, FOLD**2, 3 * FOLD + steps, fold_size=FOLD, rollback=True)
    _, cache = read(model, params, prompts, cache, lengths=lengths)
    expected, want = cache, []
    for index in range(steps):
        logits, expected = step(right[:, index], expected, counts > 0)
        want.append(logits)
    for index in range(steps):
        if index % 5 == 0:
            for ahead in range(FOLD):
                _, cache = step(wrong[:, (index + ahead) % steps], cache, ahead < counts)
            np.testing.assert_array_equal(cache.position, lengths + index + counts)
            cache = back(cache, counts)
        logits, cache = step(right[:, index], cache, counts > 0)
        np.testing.assert_array_equal(logits, want[index])


def test_roll_back_refuses_what_is_gone():
    model = model_of("2mamba")
    params = params_of(model)
    with pytest.raises(ValueError, match=r"cannot be rolled back: make it with init_cache\(..., rollback=True\)"):
        roll_back(init_cache(model.config, 3, 8), 1)
    cache = init_cache(model.config, 3, 8, fold_size=FOLD, rollback=True)
    for at in range(7):
        _, cache = read(model, params, TOKENS[:, at : at + 1], cache, lengths=(at < np.array([7, 2, 3])).astype(int))
    with pytest.raises(ValueError, match=r"\[3, 3, 3\] tokens: \[4, 2, 3\] can be taken back now, .* fold_size=4"):
        roll_back(cache, 3)
    back = jax.jit(roll_back)
    once = back(cache, np.array([3, 2, 0]))
    with pytest.raises(ValueError, match=r"\[1, 0, 3\] can be"):
        roll_back(once, 2)
    with pytest.raises(ValueError, match="cannot roll back"):
        roll_back(cache, -1)
    # Inside jit the rows that went too far are NaN from there on, and no others.
    cache = back(cache, np.array([2, 3, 3]))
    for _ in range(2):
        logits, cache = read(model, params, TOKENS[:, 7:8], cache, lengths=np.ones(3, int))
        assert np.isnan(logits).all(axis=(1, 2)).tolist() == [False, True, False]
        assert np.isfinite(logits[::2]).all()


def test_pieces_of_any_size_are_the_whole():
    """Longer and shorter than a fold, one of them empty in one row; the convolution's inputs and the ring go on."""
    model = model_of("2mamba")
    params = params_of(model)
    want, cache, at = full(model, params, TOKENS), init_cache(model.config, 3, 12, fold_size=2), np.zeros(3, int)
    for sizes in ([3, 2, 3], [1, 0, 1], [3, 3, 1], [1, 1, 1], [3, 1, 2]):
        index = np.minimum(at[:, None] + np.arange(3), 11)  # what is too much is padding
        pieces = np.take_along_axis(TOKENS, index, axis=1)
        logits, cache = read(model, params, pieces, cache, lengths=np.array(sizes))
        for b, n in enumerate(sizes):
            if n:
                assert_close(logits[b, :n], want[b, at[b] : at[b] + n])
        at += sizes
    np.testing.assert_array_equal(cache.position, at)


def test_a_bfloat16_state_costs_a_rounding_a_fold():
    model = model_of("2mamba")
    params = params_of(model)
    want = np.asarray(full(model, params, TOKENS))
    cache = init_cache(model.config, 3, 12, fold_size=FOLD, state_dtype=jnp.bfloat16)
    logits, cache = decode(model, params, TOKENS, cache)
    assert cache.layers[0].attention.state.kv.dtype == jnp.bfloat16
    error = np.abs(logits - want).max() / np.abs(want).max()
    assert 1e-6 < error < 2 * jnp.finfo(jnp.bfloat16).eps  # more than float32's, and no more than roundings add up to


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cache_is_saved_and_forked_like_any_pytree(pattern, tmp_path):
    model = stacked(pattern)
    params = params_of(model)
    _, cache = decode(model, params, TOKENS[:, :4], init_cache(model.config, 3, 12))
    leaves, structure = jax.tree.flatten(cache)
    (tmp_path / "cache").write_bytes(pickle.dumps(jax.device_get(leaves)))
    restored = jax.tree.unflatten(structure, pickle.loads((tmp_path / "cache").read_bytes()))
    tokens, others = np.split(TOKENS[:, 4:], 2, axis=1)
    first = decode(model, params, tokens, cache)[0]
    other = decode(model, params, others, cache)[0]  # another way on from the same prompt
    np.testing.assert_array_equal(decode(model, params, tokens, restored)[0], first)
    mixed = decode(model, params, np.stack([tokens[0], others[1], tokens[2]]), cache)[0]
    want = np.array(first)
    want[1] = other[1]
    np.testing.assert_array_equal(mixed, want)

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaves)
    for saved, x in zip(pickle.loads(pickle.dumps(jax.device_get(half))), half):
        assert saved.dtype == jnp.bfloat16
        np.testing.assert_array_equal(saved, x)
