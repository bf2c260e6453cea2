"""Values as they come: NumPy's arrays and integers, lists, keys of the old kind, a JAX that is told to be strict."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE
from support.models import config_of, model_of, params_of

from twomamba_jax import (
    Execution,
    MixerConfig,
    causal_convolution,
    decay_attention,
    decay_attention_step,
    generate,
    init_cache,
    init_state,
    roll_back,
)
from twomamba_jax.generation import row_keys
from twomamba_jax.sampling import Sampling, check_sampling

PROMPTS = [[1, 2, 3], [4, 5, 6]]


@functools.cache
def tiny(pattern="linear", num_layers=1):
    model = model_of(pattern, num_layers)
    return model, params_of(model, scale=1.0)


def test_generate_takes_numpy_integers_and_lists():
    model, params = tiny()
    options = {"max_new_tokens": 4, "num_samples": 3, "top_k": 5, "fold_size": 2, "prefill_size": 2}
    options = {key: np.int64(value) for key, value in options.items()}
    found = jax.eval_shape(functools.partial(generate, model, params, PROMPTS, lengths=[2, 3], **options))
    assert found.tokens.shape == (6, 4)
    for key, value in (("max_new_tokens", 0), ("num_samples", 1.0), ("top_k", True), ("fold_size", "2")):
        message = f"{key}={value!r} must be an integer of at least 1"
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(model, params, PROMPTS, **options | {key: value})


def test_configs_take_numpy_numbers():
    sizes = {"vocab_size": 23, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48}
    config = config_of("2mamba")
    assert config_of("2mamba", **{key: np.int64(size) for key, size in sizes.items()}) == config
    assert type(config_of("2mamba", d_model=np.int32(32)).d_model) is int
    assert Execution(chunk_size=np.int64(4)) == Execution(chunk_size=4)
    assert MixerConfig(score="squared", norm="softmax", scale=np.float32(0.5)).scale == 0.5


def test_a_key_of_the_old_kind_is_the_same_key():
    rows = jax.random.split(jax.random.key(3))
    for new, old in ((jax.random.key(3), jax.random.PRNGKey(3)), (rows, np.asarray(jax.random.key_data(rows)))):
        assert (row_keys(old, 2) == row_keys(new, 2)).all()
    model, params = tiny()
    draw = functools.partial(generate, model, params, PROMPTS, max_new_tokens=4, temperature=1.0)
    for key in (jax.random.PRNGKey(3), old):
        jax.eval_shape(functools.partial(draw, rng=key))
    for wrong, found in ((3, "int"), (jnp.zeros(4, jnp.uint32), "uint32 (4,)"), (jnp.zeros(2), "float32 (2,)")):
        message = f"rng must be made by jax.random.key(seed) or jax.random.PRNGKey(seed), got {found}"
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(rng=wrong)


def test_a_traced_temperature_is_a_value():
    model, params = tiny()
    draw = functools.partial(generate, model, params, PROMPTS, max_new_tokens=4, rng=jax.random.key(3))
    traced = jax.eval_shape(lambda temperature, top_p: draw(temperature=temperature, top_p=top_p), 1.0, 0.9)
    assert traced.tokens.shape == (2, 4)
    assert check_sampling(Sampling(jnp.float32(1), np.int64(3), np.float64(0.5)), 23) == (1.0, 3, 0.5)
    for wrong in (jnp.ones(2), "warm", None):
        with pytest.raises(ValueError, match=r"temperature=.* must be one number for all rows"):
            draw(temperature=wrong)
    with pytest.raises(ValueError, match="needs a random key"):
        jax.eval_shape(lambda temperature: draw(temperature=temperature, rng=None), 0.0)


def test_tokens_out_of_the_vocabulary_are_refused():
    model, params = tiny()
    for token in (23, -1, 2**40):
        message = re.escape(f"tokens[1, 2]={token} is no token of the model, which has 0 to 22: encode with")
        tokens = [[1, 2, 3], [4, 5, token]]
        read = functools.partial(model.apply, {"params": params})
        for call in (functools.partial(generate, model, params, max_new_tokens=1), read):
            with pytest.raises(ValueError, match=message):
                call(tokens)
            jax.eval_shape(lambda call=call, tokens=tokens: call(tokens, lengths=[3, 2]))  # it is padding
    with pytest.raises(ValueError, match="pad shorter ones on the right, and say with lengths"):
        generate(model, params, [[1, 2], [3]], max_new_tokens=1)


def test_traced_tokens_out_of_the_vocabulary_are_nan():
    """And not what another token has, which -1 would be if it counted from the end."""
    model, params = tiny()
    logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens))(jnp.array([[1, -1], [1, 23], [1, 2]]))
    assert np.isnan(logits[:2, 1]).all()
    assert np.isfinite(logits[2]).all()


def test_lengths_out_of_a_row_are_refused():
    model, params = tiny()
    q = jnp.ones((2, 3, 1, 4))
    for lengths in ([4, 1], [-1, 1]):
        message = re.escape(f"lengths={lengths} must be from 0 to the 3 tokens of a row")
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, PROMPTS, lengths=lengths)
        with pytest.raises(ValueError, match=message):
            decay_attention(q, q, q, lengths=np.array(lengths))


def test_a_cache_restored_as_numpy_goes_on():
    """In shape alone, for which nothing is compiled: values are the arrays' own."""
    model, params = tiny("softmax,2mamba", 2)
    cache = init_cache(model.config, 2, 9, fold_size=2, rollback=True)
    restored = flax.serialization.from_bytes(cache, flax.serialization.to_bytes(cache))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))

    def read(size):
        before = roll_back(restored, 0)
        return model.apply({"params": params}, np.ones((2, size), np.int32), cache=before, lengths=np.array([1, size]))

    for size in (1, 3):
        _, after = jax.eval_shape(functools.partial(read, size))
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)


def test_operations_take_numpy_arrays():
    q, k, v = np.ones((3, 2, 5, 2, 4), np.float32)
    log_decay, lengths = -np.ones((2, 5, 2), np.float32), np.array([3, 5])
    for score, options in (("squared", {}), ("exp", {"capacity": 9})):
        state = jax.device_get(init_state(score, 2, 2, 4, 4, **options))
        attend = functools.partial(decay_attention, q, k, v, log_decay, score=score, lengths=lengths)
        y, after = jax.eval_shape(functools.partial(attend, initial_state=state, return_final_state=True))
        assert (y.shape, jax.tree.map(jnp.shape, after)) == (q.shape, jax.tree.map(jnp.shape, state))
        token = [x[:, 0] for x in (q, k, v, log_decay)]
        jax.eval_shape(functools.partial(decay_attention_step, *token, state, score=score, normalize=True))
    convolve = functools.partial(causal_convolution, q, np.ones((2, 2, 4), np.float32), lengths=lengths)
    assert jax.eval_shape(convolve)[0].shape == q.shape


def test_no_rows_give_no_rows():
    """B = 0, as of an empty shard; a cache of no rows is refused."""
    model, params = tiny("softmax,2mamba", 2)
    q = jnp.ones((0, 3, 2, 4))
    for score in ("squared", "exp"):
        assert jax.eval_shape(functools.partial(decay_attention, q, q, q, score=score)).shape == q.shape
    read = functools.partial(model.apply, {"params": params}, jnp.zeros((0, 3), jnp.int32))
    assert jax.eval_shape(read).shape == (0, 3, 23)
    with pytest.raises(ValueError, match="batch=0 must be an integer of at least 1"):
        generate(model, params, np.zeros((0, 3), np.int32), max_new_tokens=1)


def test_runs_where_promotion_is_forbidden():
    """Shapes alone are computed: nothing is compiled."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        model = model_of("softmax,mamba2", 2)
        params = jax.eval_shape(lambda: params_of(model))
        tokens, lengths, segment_ids = (
            jnp.zeros((2, 9), jnp.int32),
            jnp.array([5, 9]),
            jnp.array([[0] * 4 + [1] * 5] * 2),
        )

        def loss(params, **rows):
            return model.apply({"params": params}, tokens, **rows).sum()

        jax.eval_shape(functools.partial(jax.grad(loss), lengths=lengths, segment_ids=segment_ids), params)

        def continued(params):
            read = functools.partial(model.apply, {"params": params})
            _, cache = read(tokens, cache=init_cache(model.config, 2, 30, fold_size=4, rollback=True), lengths=lengths)
            _, cache = read(tokens[:, :3], cache=roll_back(cache, 2))
            options = {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "stop_tokens": [1, 2], "rng": jax.random.key(0)}
            return generate(model, params, tokens, max_new_tokens=2, prefill_size=5, num_samples=2, **options)

        jax.eval_shape(continued, params)

        q = jnp.ones((2, 9, 2, 4))
        inputs = q, q, q, -q[..., 0]
        forms = (("squared", "chunked"), ("exp", "parallel"), ("squared", "recurrent"), ("exp", "chunked"))
        for score, form in forms[: None if EXHAUSTIVE else 2]:
            state = init_state(score, 2, 2, 4, 4, **({"capacity": 20} if score == "exp" else {}))
            rows = {"lengths": lengths, "segment_ids": segment_ids, "initial_state": state, "return_final_state": True}
            jax.eval_shape(functools.partial(decay_attention, *inputs, score=score, form=form, **rows))
            token = [x[:, 0] for x in inputs]
            jax.eval_shape(functools.partial(decay_attention_step, *token, state, score=score, normalize=True))


def test_a_float64_decay_of_float32_keys_is_taken():
    with jax.enable_x64(True):
        q, log_decay = jnp.ones((1, 5, 2, 4), jnp.float32), -jnp.ones((1, 5, 2), jnp.float64)
        for score in ("squared", "exp"):
            attend = functools.partial(decay_attention, q, q, q, log_decay, score=score, chunk_size=2)
            assert jax.eval_shape(attend).dtype == jnp.float32
