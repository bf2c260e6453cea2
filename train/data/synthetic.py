"""What the synthetic tasks share: the splits, the random numbers of a row, and a digest of rows.

Row i of a split is a function of (seed, split, i) alone, so that rows can be made in any order and by any process.
"""

import hashlib
from typing import Literal

import numpy as np

from train.data.rows import Rows

SPLITS = {"train": 0, "held_out": 1}
SplitName = Literal["train", "held_out"]


def row_generator(seed: int, split: SplitName, index: int) -> np.random.Generator:
    """The random numbers of one row; those of two rows, splits or seeds are independent."""
    return np.random.default_rng((seed, SPLITS[split], index))


def rows_digest(rows: Rows, count: int = 64) -> str:
    """A hash of the first rows: another generator of random numbers, or another task, shows in it."""
    made = [rows[index] for index in range(min(count, len(rows)))]
    return hashlib.sha256(b"".join(row[key].tobytes() for row in made for key in sorted(row))).hexdigest()
