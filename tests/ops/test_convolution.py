"""The causal convolution against loops, its carried inputs, and its segment resets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE

from twomamba_jax import causal_convolution

pytestmark = pytest.mark.quick

BATCH, TOKENS, CHANNELS = 3, 11, (2, 3)


def inputs(width, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (BATCH, TOKENS, *CHANNELS), (width, *CHANNELS), CHANNELS, (BATCH, width - 1, *CHANNELS)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_loops(x, kernel, bias, segment_ids, lengths, before):
    """One token, one tap at a time: history is what came before in the same segment."""
    width = kernel.shape[0]
    y, final = np.zeros(x.shape), np.zeros(before.shape)
    for b in range(x.shape[0]):
        history = list(before[b])
        for t in range(x.shape[1] if lengths is None else lengths[b]):
            if t and segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
                history = [np.zeros(CHANNELS)] * (width - 1)
            history = [*history, x[b, t]]
            y[b, t] = bias + sum(kernel[i] * history[-width + i] for i in range(width))
            history = history[1:]
        final[b] = np.array(history).reshape(final[b].shape)
    return y, final


@pytest.mark.parametrize("width", [1, 2, 3, 4] if EXHAUSTIVE else [1, 4])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("lengths", [None, np.array([11, 1, 0])])
def test_equals_loops(width, segments, lengths):
    x, kernel, bias, before = inputs(width)
    segment_ids = np.array([[0] * 4 + [1] * 1 + [0] * 6, [5] * 11, [1, 2] * 5 + [2]]) if segments else None
    want, want_final = by_loops(x, kernel, bias, segment_ids, lengths, before)
    y, final = jax.jit(causal_convolution)(
        x,
        kernel,
        bias,
        segment_ids=segment_ids,
        lengths=lengths,
        initial_inputs=before,
    )
    counts = np.full(BATCH, TOKENS) if lengths is None else lengths
    for b in range(BATCH):
        np.testing.assert_allclose(y[b, : counts[b]], want[b, : counts[b]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, want_final, rtol=1e-6)


@pytest.mark.parametrize("split", [1, 2, 7] if EXHAUSTIVE else [2])
def test_pieces_with_the_carried_inputs_are_the_whole(split):
    x, kernel, bias, before = inputs(4)
    convolve = jax.jit(causal_convolution)
    whole, final = convolve(x, kernel, bias, initial_inputs=0 * before)
    first, carried = convolve(x[:, :split], kernel, bias, initial_inputs=0 * before)
    second, carried = convolve(x[:, split:], kernel, bias, initial_inputs=carried)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), whole)
    np.testing.assert_array_equal(carried, final)


def test_gradients_of_bfloat16_inputs_are_summed_in_float32():
    """Over 8,192 tokens a running sum in bfloat16 is off by percents; rounding each term and the sum, by 2^-9."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(4, 2048, 16)) for _ in range(2))
    x, dy = (np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64) for array in (x, dy))
    kernel, bias = rng.normal(size=(2, 16)).astype(np.float32), np.zeros(16, np.float32)
    narrow = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)

    @jax.jit
    def gradients(x, dy, *weights):
        return jax.vjp(lambda *weights: causal_convolution(x, *weights)[0], *weights)[1](dy)

    found = gradients(*narrow, kernel, bias)
    expected = [(dy[:, 1:] * x[:, :-1]).sum((0, 1)), (dy * x).sum((0, 1))], dy.sum((0, 1))
    for got, want in zip(found, expected):
        assert got.dtype == jnp.float32
        assert np.sqrt(np.mean((got - np.array(want)) ** 2) / np.mean(np.square(want))) < 2**-9


def test_refuses_shapes_that_do_not_fit():
    x, kernel, bias, before = inputs(3)
    with pytest.raises(ValueError, match=r"kernel must be \[W, 2, 3\]"):
        causal_convolution(x, kernel[..., :2], bias)
    with pytest.raises(ValueError, match=r"at least W - 1, ...channels\], here \(3, 2, 2, 3\), got"):
        causal_convolution(x, kernel, bias, initial_inputs=before[:, :1])
