"""Kernels have K = V: what they are given where the two differ, with XLA's form in the kernels' place."""

import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.ops import xla
from twomamba_jax.ops.kernels import Kernels
from twomamba_jax.ops.mosaic_gpu import MOSAIC_GPU
from twomamba_jax.ops.operation import make_operation
from twomamba_jax.ops.state import FiniteState

BATCH, TOKENS, HEADS, GROUPS = 2, 7, 4, 2
HEAD_DIM, VALUE_DIM, FEATURES = 5, 2, 15


def test_padded_heads_change_neither_results_nor_gradients(monkeypatch):
    monkeypatch.setattr(Kernels, "_attend", staticmethod(xla.attend))
    op, rng = make_operation(HEAD_DIM, "squared", normalize=False, scale=None, precision=None), np.random.default_rng(0)
    shapes = (HEADS, HEAD_DIM), (GROUPS, HEAD_DIM), (GROUPS, VALUE_DIM)
    arrays = [jnp.asarray(rng.normal(size=(BATCH, TOKENS, *shape)), jnp.float32) for shape in shapes]
    decay = -jnp.asarray(rng.uniform(size=(BATCH, TOKENS, GROUPS)), jnp.float32)
    state = FiniteState(
        *(jnp.asarray(rng.normal(size=(BATCH, GROUPS, FEATURES, *rest)), jnp.float32) for rest in ((VALUE_DIM,), ()))
    )

    @jax.jit
    def results(*inputs):
        def call(attend, q, k, v, log_decay, state):
            return attend(op, "chunked", 4, True, q, k, v, log_decay, None, state, None)

        def with_gradients(attend):
            y, pull = jax.vjp(lambda *inputs: call(attend, *inputs), *inputs)
            return y, pull(jax.tree.map(jnp.cos, y))

        return with_gradients(MOSAIC_GPU.attend), with_gradients(xla.attend)

    found, expected = results(*arrays, decay, state)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5), found, expected)
