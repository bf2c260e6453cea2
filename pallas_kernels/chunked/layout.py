"""How the kernels lay out a state of squared scores: tiles of 64 products of features, each pair of features once.

A state holds S_ab = sum_j k_a k_b v_j for a <= b. Features are taken in four blocks of 16, and a pair of blocks is kept
once: 2560 rows instead of 4096, as 40 tiles of 64 rows, of three kinds. A row of a tile is a pair (a, b); in tile i
of its kind, a band of rows has one a, `feature + i step`, and the b from `first` to 63.

The state that leaves the operation has K (K + 1) / 2 = 2080 rows, in the order and with the weights of
`twomamba_jax.ops.score`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

HEAD_DIM = 64
BLOCK = 16
TILES = 40


@dataclasses.dataclass(frozen=True)
class Band:
    """Rows of the tiles of one kind.

    Attributes:
      feature: a in the kind's first tile.
      step: what a grows by from one tile to the next.
      first: the b of the band's first row; that of the last is 63.
    """

    feature: int
    step: int
    first: int

    @property
    def size(self) -> int:
        """Rows of the band."""
        return HEAD_DIM - self.first


@dataclasses.dataclass(frozen=True)
class Kind:
    """Tiles that are alike but for their a.

    Attributes:
      start: the number of the kind's first tile.
      count: how many tiles.
      bands: from the first row to the last.
    """

    start: int
    count: int
    bands: tuple[Band, ...]


# Of the pairs of blocks with A <= B: those with A = 0; those with A = 1, and (3, 3); the other two with A = 2.
KINDS = (
    Kind(0, 16, (Band(0, 1, 0),)),
    Kind(16, 16, (Band(48, 1, 48), Band(16, 1, 16))),
    Kind(32, 8, (Band(32, 2, 32), Band(33, 2, 32))),
)
STARTS = (*(kind.start for kind in KINDS), TILES)


@functools.cache
def pairs() -> np.ndarray:
    """[40, 64, 2]: the (a, b) of every row."""
    tiles = []
    for kind in KINDS:
        for i in range(kind.count):
            tiles.append(
                [(band.feature + i * band.step, b) for band in kind.bands for b in range(band.first, HEAD_DIM)]
            )
    return np.array(tiles)


@functools.cache
def multiplicity() -> np.ndarray:
    """[40, 64] float32: how many of the entries (a, b) and (b, a) of a full matrix a row stands for.

    It is 1 inside a block, where both have rows of their own, and 2 otherwise.
    """
    a, b = np.moveaxis(pairs() // BLOCK, -1, 0)
    return np.where(a == b, 1, 2).astype(np.float32)


def block_multiplicity() -> np.ndarray:
    """[40, 4] float32: `multiplicity`, which is the same for 16 rows at a time."""
    return multiplicity()[:, ::BLOCK]


@functools.cache
def _positions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[40 * 64]: the public row of every row; [2080]: a row of every public one; [2080]: the public ones' weights."""
    half = HEAD_DIM // 2
    public = {}
    for offset in range(half + 1):
        for a in range(half if offset == half else HEAD_DIM):
            b = (a + offset) % HEAD_DIM
            public[a, b] = public[b, a] = offset * HEAD_DIM + a
    to_public = np.array([public[a, b] for a, b in pairs().reshape(-1, 2).tolist()])
    rows = np.zeros(max(to_public) + 1, np.int64)
    rows[to_public] = np.arange(len(to_public))
    weights = np.where(np.arange(len(rows)) < HEAD_DIM, 1, math.sqrt(2))
    return to_public, rows, weights.astype(np.float32)


def pack(kv: jax.Array) -> jax.Array:
    """A public state [B, G, 2080, V], or its gradient, as tiles [B, G, 40, 64, V]."""
    to_public, _, weights = _positions()
    kv = kv / weights[:, None]
    return kv[:, :, to_public].reshape(*kv.shape[:2], TILES, HEAD_DIM, kv.shape[-1])


def unpack(tiles: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    _, rows, weights = _positions()
    return tiles.reshape(*tiles.shape[:2], -1, tiles.shape[-1])[:, :, rows] * weights[:, None]


def pack_normalizer(key_sum: jax.Array) -> jax.Array:
    """A public normaliser [B, G, 2080], or its gradient, as a symmetric matrix [B, G, 64, 64]."""
    matrix = np.zeros((HEAD_DIM, HEAD_DIM), np.int64)
    to_public, _, weights = _positions()
    a, b = pairs().reshape(-1, 2).T
    matrix[a, b] = matrix[b, a] = to_public
    return (key_sum / weights)[:, :, matrix]


def unpack_normalizer(matrix: jax.Array) -> jax.Array:
    """The inverse of `pack_normalizer`."""
    _, rows, weights = _positions()
    a, b = jnp.asarray(pairs().reshape(-1, 2)[rows].T)
    return matrix[:, :, a, b] * weights
