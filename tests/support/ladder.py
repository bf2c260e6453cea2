"""The conditioning ladder: keys in a subspace, and queries that leave it step by step (docs/numerics.md)."""

import numpy as np

# (share of q's norm that lies in the keys' subspace of 8 dimensions, relative error allowed with bf16 features): 1.3 to
# 2 times what docs/numerics.md lists.
LADDER = [(None, 3.6e-3), (0.3, 6e-3), (0.1, 4.5e-2), (0.03, 0.7)]


def ladder_inputs(share, tokens=512, size=64, rank=8):
    """Keys in a random subspace of `rank` dimensions, queries with `share` of their norm in it (None: anywhere)."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, tokens, 2, size))
    v = rng.normal(size=(1, tokens, 2, size))
    if share is not None:
        inside, outside = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q[..., :rank], q[..., rank:]))
        q = np.sqrt(size) * np.concatenate([share * inside, np.sqrt(1 - share**2) * outside], axis=-1)
        k[..., rank:] = 0
        # Along the coordinate axes every product with a zero would be exact, and nothing would cancel.
        rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
        q, k = q @ rotation, k @ rotation
    return q, k, v


def relative_rms(got, want):
    got = np.asarray(got, np.float64)
    return np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
