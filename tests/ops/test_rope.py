"""Rotary embeddings: against complex multiplication, and the property they exist for."""

import jax.numpy as jnp
import numpy as np
import pytest

from twomamba_jax.ops.rope import apply_rope

pytestmark = pytest.mark.quick


def test_turns_interleaved_pairs_by_complex_multiplication():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 100, 5, 0]])
    angles = positions[..., None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    y = apply_rope(jnp.asarray(x), jnp.asarray(positions))
    np.testing.assert_allclose(y[..., 0::2], turned.real, atol=2e-5)
    np.testing.assert_allclose(y[..., 1::2], turned.imag, atol=2e-5)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    products = [
        float((apply_rope(q, jnp.array([[p + 3]])) * apply_rope(k, jnp.array([[p]]))).sum()) for p in (0, 11, 500)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-3)


def test_refuses_an_odd_head_dimension():
    with pytest.raises(ValueError, match="must be even, got 5"):
        apply_rope(jnp.ones((1, 1, 1, 5)), jnp.zeros((1, 1), int))
