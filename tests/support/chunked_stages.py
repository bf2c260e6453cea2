"""Arrays of one small call of the chunked stages of the squared score, and their float64 counterparts."""

import jax.numpy as jnp
import numpy as np
from support.chunked_cases import normal, wide

from pallas_kernels.chunked import layout

BATCH, TOKENS, HEADS, GROUPS, CHUNK = 1, 256, 2, 1, 128
CHUNKS = TOKENS // CHUNK
PAIRS = layout.pairs()


def by_chunk(x):
    return wide(x).reshape(BATCH, CHUNKS, CHUNK, HEADS, -1)


def full_state(seed):
    """Tiles of a state in bfloat16, and the same as a symmetric array [B, G, N, 64, 64, V]."""
    tiles = wide(normal(seed, BATCH, GROUPS, CHUNKS, layout.TILES, 64, 64))
    rows = tiles.reshape(BATCH, GROUPS, CHUNKS, -1, 64)
    # Pairs inside a block have two rows, of one value in a real state: that of the first.
    first = np.full((64, 64), -1)
    for row, (a, b) in reversed(list(enumerate(PAIRS.reshape(-1, 2)))):
        first[a, b] = first[b, a] = row
    assert (first >= 0).all()
    tiles = rows[..., first[PAIRS[..., 0], PAIRS[..., 1]], :]
    return jnp.asarray(tiles, jnp.bfloat16), rows[..., first, :]


def two_parts(seed):
    """A normaliser as a sum of two bfloat16 matrices, and in float64."""
    z = wide(normal(seed, BATCH, GROUPS, CHUNKS, 64, 64, dtype=jnp.float32))
    z = (z @ z.swapaxes(-1, -2)).astype(np.float32)
    high = jnp.asarray(z, jnp.bfloat16)
    return jnp.stack([high, jnp.asarray(z - np.asarray(high, np.float32), jnp.bfloat16)], axis=3), wide(z)
