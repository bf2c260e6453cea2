"""Queries and keys that heads share, as every head has them."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.ops.layout import repeat_heads


def test_heads_of_a_group_have_its_queries():
    x = jnp.arange(2 * 3 * 2 * 4, dtype=jnp.float32).reshape(2, 3, 2, 4)
    y = repeat_heads(x, 6)
    assert y.shape == (2, 3, 6, 4)
    for head in range(6):
        np.testing.assert_array_equal(y[:, :, head], x[:, :, head // 3])


def test_gradient_over_heads_is_summed_in_float32():
    """In bfloat16 a sum of ones stands still at 256."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)

    def total(x):
        return repeat_heads(x, 1000).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(total)(x).astype(jnp.float32), 1000)
    sums = re.findall(r":(\w+)\[[\d,]*\] = reduce_sum", str(jax.make_jaxpr(jax.grad(total))(x)))
    assert set(sums) == {"f32"}
