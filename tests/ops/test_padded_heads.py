"""Kernels have K = V: what they are given where the two differ, with XLA's form in the kernels' place."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twomamba_jax.ops import kernels
from twomamba_jax.ops.operation import make_operation
from twomamba_jax.ops.state import FiniteState

attend_by_xla = importlib.import_module("twomamba_jax.ops.decay_attention")._attend
BATCH, TOKENS, HEADS, GROUPS = 2, 7, 4, 2
FEATURES = {("squared", 5): 15, ("linear", 3): 3}


@pytest.mark.parametrize(("score", "head_dim", "value_dim"), [("squared", 5, 2), ("linear", 3, 4)])
def test_padded_heads_change_neither_results_nor_gradients(score, head_dim, value_dim, monkeypatch):
    monkeypatch.setattr(kernels, "_attend", attend_by_xla)
    op, rng = make_operation(head_dim, score, normalize=False, scale=None, precision=None), np.random.default_rng(0)
    features = FEATURES[score, head_dim]
    shapes = (HEADS, head_dim), (GROUPS, head_dim), (GROUPS, value_dim)
    arrays = [jnp.asarray(rng.normal(size=(BATCH, TOKENS, *shape)), jnp.float32) for shape in shapes]
    decay = -jnp.asarray(rng.uniform(size=(BATCH, TOKENS, GROUPS)), jnp.float32)
    state = FiniteState(
        *(jnp.asarray(rng.normal(size=(BATCH, GROUPS, features, *rest)), jnp.float32) for rest in ((value_dim,), ()))
    )

    @jax.jit
    def results(*inputs):
        def call(attend, q, k, v, log_decay, state):
            return attend(op, "chunked", 4, True, q, k, v, log_decay, None, state, None)

        def with_gradients(attend):
            y, pull = jax.vjp(lambda *inputs: call(attend, *inputs), *inputs)
            return y, pull(jax.tree.map(jnp.cos, y))

        return with_gradients(kernels.attend), with_gradients(attend_by_xla)

    found, expected = results(*arrays, decay, state)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5), found, expected)
