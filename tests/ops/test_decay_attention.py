"""The public operation: refusals, choices, the key/value cache's capacity, outputs at padding."""

import inspect
import logging
import runpy
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.cases import Case

from twomamba_jax import decay_attention, decay_attention_step, init_state, state_bytes
from twomamba_jax.ops import dispatch, xla
from twomamba_jax.ops.decay_attention import Options
from twomamba_jax.ops.score import features, num_features

pytestmark = pytest.mark.quick


def arrays(**settings):
    made = Case(tokens=6, head_dim=4, heads=(4, 2), **settings).arrays(np.float32)
    return {name: made[name] for name in ("q", "k", "v", "log_decay")}


# Its four arrays, which were keys and values [B, S, G, .], log_weights and length, in the structure of four arrays.
OF_AN_EARLIER_VERSION = jax.tree.unflatten(
    jax.tree.structure(init_state("exp", 3, 2, 4, 3, capacity=9, decay=False)),
    [np.zeros((3, 9, 2, 4)), np.zeros((3, 9, 2, 3)), np.zeros((3, 9, 2)), np.zeros(3, int)],
)

REFUSED = [
    ({"q": lambda x: x[0]}, {}, r"q must be \[B, T, heads, dim\]"),
    ({"v": lambda x: x.astype(jnp.int32)}, {}, "v must be floating point"),
    ({"k": lambda x: x.astype(jnp.bfloat16)}, {}, "share one dtype, got q float32 and k bfloat16"),
    ({"k": lambda x: x[:, :5]}, {}, r"k has \[B, T\] = \(3, 5\), but q has \(3, 6\)"),
    ({"q": lambda x: x[:, :0], "k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, {}, "at least one token"),
    ({"k": lambda x: x[..., :3]}, {}, "share their head dimension, got 4 and 3"),
    ({"v": lambda x: x[:, :, :1]}, {}, "same heads, got 2 and 1"),
    ({"q": lambda x: x[:, :, :3]}, {}, "3 query heads must be a multiple of the 2"),
    ({"log_decay": lambda x: x[:, :, :1]}, {}, r"log_decay must be \[B, T, G\] = \(3, 6, 2\)"),
    ({"log_decay": lambda x: x.astype(jnp.bfloat16)}, {}, "log_decay must be float32 or float64, got bfloat16"),
    ({}, {"segment_ids": np.zeros((3, 5), int)}, r"segment_ids must have shape \(3, 6\)"),
    ({}, {"segment_ids": np.zeros((3, 6), np.float32)}, "segment_ids must be integers, got dtype float32"),
    ({}, {"lengths": np.zeros((2,), int)}, r"lengths must have shape \(3,\)"),
    ({}, {"score": "cubed"}, "score='cubed' is unknown: expected one of linear, squared, exp"),
    ({}, {"precision": "low"}, "precision='low' is unknown"),
    ({}, {"form": "serial"}, "form='serial' is unknown: expected None or one of parallel, chunked, recurrent"),
    ({}, {"form": "recurrent", "score": "exp"}, "score='exp' has none: use form='chunked'"),
    ({}, {"chunk_size": 0}, "chunk_size=0 must be an integer of at least 1"),
    ({}, {"chunk_size": 4, "form": "parallel"}, "form='parallel', which has no chunks"),
    ({}, {"implementation": "cuda"}, "implementation='cuda' is unknown"),
    (
        {},
        {"implementation": "mosaic_gpu"},
        "implementation='mosaic_gpu' cannot compute this call: it needs a Hopper GPU",
    ),
    ({}, {"initial_state": init_state("exp", 3, 2, 4, 3, capacity=9)}, "continues a FiniteState, got KeyValueCache"),
    ({}, {"initial_state": init_state("squared", 3, 2, 5, 3)}, r"state's kv must have shape \(3, 2, 10, 3\)"),
    (
        {},
        {"score": "exp", "initial_state": init_state("exp", 3, 2, 4, 3, capacity=5)},
        "holds 5 tokens and would need 6",
    ),
    (
        {},
        {"score": "exp", "initial_state": init_state("exp", 3, 2, 4, 3, capacity=9, decay=False)},
        "made with decay=False, and log_decay is given: make it with init_state",
    ),
    (
        {},
        {"score": "exp", "initial_state": OF_AN_EARLIER_VERSION},
        r"heads first, .* got keys of shape \(3, 9, 2, 4\): if it is of an earlier version, .* read its prompt again",
    ),
]


@pytest.mark.parametrize(("changes", "options", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses_what_it_cannot_compute(changes, options, message):
    inputs = {name: changes.get(name, lambda x: x)(x) for name, x in arrays().items()}
    if inputs["q"].shape[1] == 0:
        inputs["log_decay"] = None
    with pytest.raises(ValueError, match=message):
        decay_attention(**inputs, **options)


def test_step_refuses_a_token_axis_and_a_full_cache():
    q, k, v, log_decay = arrays().values()
    state = init_state("squared", 3, 2, 4, 3)
    with pytest.raises(ValueError, match=r"one token without a T axis, got shape \(3, 6, 4, 4\)"):
        decay_attention_step(q, k, v, log_decay[:, 0], state, score="squared", normalize=True)
    with pytest.raises(ValueError, match=r"log_decay must be \[B, G\]"):
        decay_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state, score="squared", normalize=True)
    full = init_state("exp", 3, 2, 4, 3, capacity=1)._replace(length=np.ones(3, np.int32))
    with pytest.raises(ValueError, match="holds 1 tokens and would need 2"):
        decay_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], full, score="exp", normalize=True)


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_full_cache_gives_nan_in_its_rows_alone_under_jit(tokens):
    q, k, v, log_decay = (x[:, :tokens] for x in arrays().values())
    cache = init_state("exp", 3, 2, 4, 3, capacity=8)
    cache = cache._replace(length=np.array([8 - tokens, 8 - tokens + 1, 0], np.int32))

    @jax.jit
    def attend(cache):
        if tokens == 1:
            token = (x[:, 0] for x in (q, k, v, log_decay))
            return decay_attention_step(*token, cache, score="exp", normalize=True)[0]
        return decay_attention(q, k, v, log_decay, score="exp", initial_state=cache)

    y = np.asarray(attend(cache)).reshape(3, -1)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(y[[0, 2]]).all()


def test_a_cache_with_decays_takes_tokens_without_one():
    """Which are tokens whose log decay is 0."""
    q, k, v, log_decay = arrays().values()
    cache = init_state("exp", 3, 2, 4, 3, capacity=12)

    @jax.jit
    def attend(log_decay, cache):
        return decay_attention(q, k, v, log_decay, score="exp", initial_state=cache, return_final_state=True)

    _, cache = attend(log_decay, cache)
    want, want_state = attend(np.zeros_like(log_decay), cache)
    got, state = attend(None, cache)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state, want_state)


@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
def test_padding_is_never_read(score):
    """Poisoned padding changes no bit of the outputs, which are 0 there, nor of the final state."""
    inputs = arrays(score=score)
    lengths = np.array([6, 2, 0])
    padding = np.arange(6) >= lengths[:, None]

    @jax.jit
    def attend(inputs):
        return decay_attention(**inputs, score=score, lengths=lengths, return_final_state=True)

    clean, clean_state = attend(inputs)
    poisoned = {name: x.copy() for name, x in inputs.items()}
    for x in poisoned.values():
        x[padding] = np.nan
    dirty, dirty_state = attend(poisoned)
    np.testing.assert_array_equal(dirty, clean)
    assert (np.asarray(clean)[padding] == 0).all()
    if score == "exp":
        used = np.arange(6) < lengths[:, None]
        for dirty, clean in ((dirty_state.log_decay, clean_state.log_decay), (dirty_state.keys, clean_state.keys)):
            np.testing.assert_array_equal(np.moveaxis(dirty, 2, 1)[used], np.moveaxis(clean, 2, 1)[used])
    else:
        jax.tree.map(np.testing.assert_array_equal, dirty_state, clean_state)


@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
def test_chooses_the_cheaper_form(score, monkeypatch):
    """By the flops of each: short sequences in one piece, long ones in chunks."""
    chosen = []
    for form in ("parallel", "chunked", "blockwise"):
        monkeypatch.setattr(xla, form, lambda *args, form=form: chosen.append(form) or real[form](*args))
    for tokens in (128, 8192):
        q = jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.float32)
        jax.eval_shape(lambda q: decay_attention(q, q, q, score=score), q)
    chunked = "blockwise" if score == "exp" else "chunked"
    assert chosen == ["parallel", chunked]
    jax.eval_shape(
        lambda q: decay_attention(q, q, q, score=score, chunk_size=64),
        jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.float32),
    )
    assert chosen[-1] == chunked


real = {form: getattr(xla, form) for form in ("parallel", "chunked", "blockwise")}


def test_says_once_what_it_chose(caplog):
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="twomamba_jax"):
        for _ in range(2):
            jax.eval_shape(lambda: decay_attention(**arrays()))
        jax.eval_shape(lambda: decay_attention(**arrays(), implementation="xla"))
    assert [record.message for record in caplog.records] == [
        "decay_attention: form=parallel, implementation=xla "
        "(mosaic_gpu: it needs a Hopper GPU, and the default backend is 'cpu')"
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 64])
def test_squared_features_multiply_to_the_squared_product(size):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 7, size))
    with jax.enable_x64(True):
        phi_q, phi_k = np.asarray(jax.jit(lambda x: features("squared", x))(np.stack([q, k])))
        assert phi_q.shape[-1] == num_features("squared", size) == size * (size + 1) // 2
        np.testing.assert_allclose((phi_q * phi_k).sum(-1), (q * k).sum(-1) ** 2, rtol=1e-12)
        np.testing.assert_allclose(phi_k, oracle.symmetric_features(k), rtol=1e-14)


def test_states_have_the_sizes_of_the_design():
    assert state_bytes(init_state("squared", 1, 1, 64, 64)) == 4 * 2080 * (64 + 1)
    assert state_bytes(init_state("linear", 2, 3, 64, 32)) == 4 * 2 * 3 * 64 * (32 + 1)
    cache = init_state("exp", 2, 3, 64, 32, capacity=10, dtype=jnp.bfloat16)
    assert state_bytes(cache) == 2 * 10 * 3 * (2 * (64 + 32) + 4) + 2 * 2 * 4
    bare = init_state("exp", 2, 3, 64, 32, capacity=10, dtype=jnp.bfloat16, decay=False)
    assert state_bytes(cache) - state_bytes(bare) == 2 * 10 * 3 * 4
    with pytest.raises(ValueError, match="capacity must be at least 1, got None"):
        init_state("exp", 1, 1, 4, 4)
    with pytest.raises(ValueError, match="constant size: omit it"):
        init_state("squared", 1, 1, 4, 4, capacity=9)


def test_composes_with_vmap_and_checkpoint():
    """An extra mapped axis, and recomputation in the backward pass, change nothing."""
    inputs = jax.tree.map(np.asarray, arrays(score="linear"))
    stacked = jax.tree.map(lambda x: np.stack([x, x * np.float32(0.5)]), inputs)

    def loss(inputs):
        return (decay_attention(**inputs, score="linear", form="chunked", chunk_size=4) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    one_by_one = [gradient(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(stacked)
    for i, want in enumerate(one_by_one):
        one = jax.tree.map(lambda x, i=i: np.asarray(x)[i], mapped)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, want)


def test_the_type_of_the_result_follows_return_final_state():
    """The overloads take what the function takes, and name its result for each value.

    Read from the module as it is without what checks its annotations here, which hides all overloads but the last.
    """
    plain = runpy.run_path(inspect.getsourcefile(inspect.unwrap(decay_attention)))["decay_attention"]
    signature = inspect.signature(plain)
    whole, options, results = dict(signature.parameters), typing.get_type_hints(Options), {}
    del whole["return_final_state"]
    assert {name: whole.pop(name).annotation for name in options} == options
    for overload in typing.get_overloads(plain):
        own = inspect.signature(overload)
        *arrays, returns, _ = own.parameters.values()
        assert arrays == list(whole.values())
        results[returns.annotation, returns.default] = own.return_annotation
    y, both = typing.get_args(signature.return_annotation)
    required = inspect.Parameter.empty
    assert results == {
        (typing.Literal[False], False): y,
        (typing.Literal[True], required): both,
        (bool, required): y | both,
    }
