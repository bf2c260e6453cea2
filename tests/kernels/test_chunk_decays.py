"""Sums of decays over chunks of several tiles of 128, against running sums in float64."""

import jax.numpy as jnp
import numpy as np
from support.chunked_cases import normal, wide

from pallas_kernels.chunked.decays import TILE, chunk_weights, decay_gradient
from pallas_kernels.quadratic.operands import Decay

CHUNKS, GROUPS, CHUNK = 2, 2, 3 * TILE
TOKENS = CHUNKS * CHUNK


def test_weights_of_three_tiles():
    log_decay = -0.01 * abs(normal(0, 1, TOKENS, GROUPS, dtype=jnp.float32))
    decay = Decay.make(log_decay.reshape(CHUNKS, CHUNK, GROUPS), TILE)
    weights = chunk_weights(decay, None, (1, TOKENS, GROUPS), CHUNK)
    sums = wide(log_decay).swapaxes(1, 2).reshape(1, GROUPS, CHUNKS, CHUNK).cumsum(-1)
    np.testing.assert_allclose(weights.through, np.exp(sums).reshape(1, GROUPS, -1), rtol=1e-5)
    np.testing.assert_allclose(weights.reach, np.exp(sums[..., -1:] - sums).reshape(1, GROUPS, -1), rtol=1e-5)
    np.testing.assert_allclose(weights.keep, np.exp(sums[..., -1]), rtol=1e-5)


def test_gradient_over_three_tiles():
    rows, columns = (normal(seed, 1, GROUPS, TOKENS, dtype=jnp.float32) for seed in (1, 2))
    kept = normal(3, 1, GROUPS, CHUNKS, dtype=jnp.float32)
    found = decay_gradient(rows, columns, kept, CHUNK)
    rows, columns = (wide(x).reshape(1, GROUPS, CHUNKS, CHUNK) for x in (rows, columns))
    want = rows[..., ::-1].cumsum(-1)[..., ::-1] + columns.cumsum(-1) - columns + wide(kept)[..., None]
    np.testing.assert_allclose(found, want.reshape(1, GROUPS, -1).swapaxes(1, 2), atol=1e-4)
