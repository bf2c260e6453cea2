"""Padding that holds NaN, memory that nobody wrote: gradients are those of padding that holds numbers, to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import exhaustive
from support.models import model_of, params_of

from twomamba_jax import VARIANTS, Mixer, causal_convolution, decay_attention

pytestmark = pytest.mark.quick

LENGTHS = np.array([4, 0, 7])
PADDING = np.arange(7) >= LENGTHS[:, None]


def poisoned(x):
    """`x [B, T, ...]` with NaN in its padding."""
    return np.where(PADDING.reshape(3, 7, *[1] * (x.ndim - 2)), np.float32(np.nan), x)


def assert_same_gradients(loss, weights, inputs):
    """Of `loss(weights, inputs)`, for inputs with and without NaN in their padding: finite, and 0 at padding."""
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    clean, dirty = gradients(weights, inputs), gradients(weights, jax.tree.map(poisoned, inputs))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    for leaf in jax.tree.leaves(dirty):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(dirty[1]):
        assert not np.asarray(leaf)[PADDING].any()


@pytest.mark.parametrize(
    ("score", "form"),
    [
        ("linear", "parallel"),
        ("squared", "chunked"),
        ("exp", "chunked"),
    ],
)
def test_nan_padding_reaches_no_gradient_of_attention(score, form):
    draw = np.random.default_rng(0)
    q, k, v, log_decay = (
        draw.uniform(size=(3, 7, *shape)).astype(np.float32) for shape in ((2, 4), (1, 4), (1, 4), (1,))
    )
    segment_ids = np.array([[0, 0, 1, 1, 2, 2, 2]] * 3)
    attend = functools.partial(
        decay_attention, score=score, form=form, lengths=LENGTHS, segment_ids=segment_ids, return_final_state=True
    )

    def loss(_, inputs):
        y, state = attend(*inputs[:3], -inputs[3], chunk_size=3 if form == "chunked" else None)
        of_state = (jnp.where(jnp.isfinite(x), x, 0).sum() for x in jax.tree.leaves(state) if x.ndim > 1)
        return (y**2).sum() + sum(of_state)

    assert_same_gradients(loss, (), (q, k, v, log_decay))


def test_nan_padding_reaches_no_gradient_of_convolution():
    x, kernel = np.ones((3, 7, 2), np.float32), np.ones((3, 2), np.float32)

    def loss(kernel, inputs):
        y, last = causal_convolution(inputs, kernel, kernel[0], lengths=LENGTHS)
        return jnp.where(PADDING[..., None], 0, y**2).sum() + last.sum()

    assert_same_gradients(loss, kernel, x)


@exhaustive("its parts above, and a whole model below")
def test_nan_padding_reaches_no_gradient_of_a_mixer():
    mixer = Mixer(VARIANTS["mamba2"].mixer, num_heads=4, head_dim=8, num_kv_heads=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 32)), jnp.float32)
    params = params_of(model_of("mamba2"))["layers_0"]["mixer"]

    def loss(params, x):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        y, _ = mixer.apply({"params": params}, x, lengths=LENGTHS)
        return jnp.where(PADDING[..., None], 0, y**2).sum()

    assert_same_gradients(loss, params, x)


def test_foreign_padding_reaches_no_gradient_of_a_model():
    """-100 marks padding in labels, and the model's vocabulary ends with 22: neither has an embedding."""
    model = model_of("2mamba-e")
    tokens = np.arange(21).reshape(3, 7) % 23

    @jax.jit
    def gradient(params, tokens):
        def loss(params):
            logits = model.apply({"params": params}, tokens, lengths=LENGTHS)
            return jnp.where(PADDING, 0, jax.nn.logsumexp(logits, -1)).sum()

        return jax.grad(loss)(params)

    params = params_of(model)
    clean = gradient(params, tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    for foreign in (-100, 23):
        dirty = gradient(params, np.where(PADDING, foreign, tokens))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
