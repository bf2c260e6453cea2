"""RMSNorm, SwiGLU and the product of projections against NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twomamba_jax import RMSNorm, SwiGLU
from twomamba_jax.layers.projection import product

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("axes", "dims"), [(("embed",), (-1,)), (("heads", "head_dim"), (-2, -1))])
def test_rms_norm(axes, dims):
    """Over the named dimensions together; rows as small as sqrt(eps) and as large as 1e6, to see eps and the mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 8)) * np.array([3e-3, 1.0, 1e6])[:, None, None]
    scale = rng.normal(size=x.shape[-len(axes) :])
    expected = scale * x / np.sqrt(np.mean(x**2, axis=dims, keepdims=True) + 1e-4)
    norm = RMSNorm(axes, eps=1e-4)
    initial = norm.init(jax.random.key(0), x)["params"]["scale"]
    assert initial.names == axes
    np.testing.assert_array_equal(initial.value, np.ones(scale.shape))
    y = norm.apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    # x and scale are rounded to float32, then a square root and three products: 5 epsilon of each number.
    np.testing.assert_allclose(y, expected, rtol=5 * 2.0**-23)


def test_rms_norm_of_bfloat16_takes_the_mean_in_float32():
    """One rounding to bfloat16 at the end, half of 2^-7 at most; 4096 squares summed in bfloat16 would be far off."""
    x = jax.random.normal(jax.random.key(0), (2, 4096), jnp.bfloat16)
    y = RMSNorm(dtype=jnp.bfloat16).apply({"params": {"scale": jnp.ones(4096)}}, x)
    assert y.dtype == jnp.bfloat16
    wide = np.float64(x)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.float64(y), expected, rtol=2.0**-8 * (1 + 1e-3))


def test_swiglu():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8))
    mlp = SwiGLU(mlp_dim=5)
    shapes = nn.unbox(jax.eval_shape(mlp.init, jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "gate": {"kernel": (8, 5)},
        "up": {"kernel": (8, 5)},
        "down": {"kernel": (5, 8)},
    }
    gate, up = x @ params["gate"]["kernel"], x @ params["up"]["kernel"]
    hidden = gate / (1 + np.exp(-gate)) * up
    expected = hidden @ params["down"]["kernel"]
    y = mlp.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))
    # Sums of 8 and 5 products: a few epsilon of the sum of their sizes.
    sizes = np.abs(hidden) @ np.abs(params["down"]["kernel"]) + 1
    assert (np.abs(y - expected) < 16 * 2.0**-23 * sizes).all()


@pytest.mark.parametrize(("backend", "shape", "rows"), [("gpu", (1, 1), 2), ("gpu", (3, 1), 3), ("cpu", (1, 1), 1)])
def test_one_row_is_multiplied_as_two_on_a_gpu(backend, shape, rows, monkeypatch):
    """Two rows are a product of matrices to XLA if it cannot see that they are alike; the result is one row's."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, kernel = jax.random.normal(jax.random.key(0), (*shape, 2, 8)), jax.random.normal(jax.random.key(1), (2, 8, 5))
    call = jax.jit(functools.partial(product, rank=2))
    np.testing.assert_allclose(call(x, kernel), np.einsum("btij,ijk->btk", x, kernel), rtol=1e-5, atol=1e-5)
    text = call.lower(x, kernel).as_text()
    assert f"(tensor<{rows}x1x2x8xf32>, tensor<2x8x5xf32>)" in text
    assert ("optimization_barrier" in text) == (rows == 2)


@pytest.mark.parametrize("shape", [(8,), (2, 0, 8), (1, 0, 8)])
def test_no_rows_and_a_vector_are_multiplied_as_they_are(shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert product(jnp.ones(shape), jnp.ones((8, 5)), 1).shape == (*shape[:-1], 5)
