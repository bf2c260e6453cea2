"""State tracking: the word problem of a group. Tokens are elements, and the state is their product so far.

    tokens   x_1   x_2       ...   x_n
    targets  x_1   x_1 x_2   ...   x_1 x_2 ... x_n

`parity` is the group of two elements: bits, and the parity of all of them. Only the last target has a weight, as in
Grazzi et al., arXiv 2411.12537, who train at lengths from 3 to 40, read at 40 to 256 and scale accuracy,
(accuracy - 1/2) / (1/2). `s5` are the 120 permutations of five things, as in Merrill et al., arXiv 2404.08819, with a
weight on every target; (x y)(i) = x(y(i)), and elements are numbered as the tuples of their values are sorted.

A decay in (0, 1], as every mixer here has, cannot flip the sign of what it keeps: Grazzi et al. prove that linear
recurrences of such decays, of any number of layers and in finite precision, solve parity at no more than bounded
lengths. The word problem of S5 is complete for NC1, which such recurrences and softmax attention of a fixed number of
layers cannot reach if TC0 is less (Merrill et al.). Failing here past the trained lengths is what theory says of them.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.data.rows import Batch
from train.data.synthetic import SplitName, row_generator, rows_digest
from train.errors import UserError, nearest


def permutation_products(size: int) -> np.ndarray:
    """[n, n], n = size!: the number of x y for the numbers of two permutations of `size` things."""
    permutations = np.array(list(itertools.permutations(range(size))))
    digits = size ** np.arange(size)
    numbers = np.zeros(size**size, np.int64)
    numbers[permutations @ digits] = np.arange(len(permutations))
    return numbers[permutations[:, permutations] @ digits]


# By name: the products [n, n] of the group's elements, and whether every target counts or the last alone.
GROUPS = {"parity": (np.array([[0, 1], [1, 0]]), False), "s5": (permutation_products(5), True)}
GroupName = Literal["parity", "s5"]


@dataclass(frozen=True)
class StateTrackingRows:
    """Rows of the task.

    Attributes:
      seed: with the split and a row's index, what the row is a function of.
      split: `train` or `held_out`.
      num_rows: how many rows there are.
      group: `parity` or `s5`.
      lengths: (shortest, longest) word; T is the longest, and shorter ones are padded at their right.

    Raises:
      UserError: an unknown group, or lengths that are no range.
    """

    seed: int
    split: SplitName
    num_rows: int
    group: GroupName
    lengths: tuple[int, int]

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise UserError(f"unknown group {self.group!r}; {nearest(self.group, GROUPS)}")
        if not 1 <= self.lengths[0] <= self.lengths[1]:
            raise UserError(f"lengths={self.lengths} must be a range (shortest, longest) from 1")

    @property
    def length(self) -> int:
        """T."""
        return self.lengths[1]

    @property
    def num_tokens(self) -> int:
        """How many token values there are: the elements, 0 first, and the padding."""
        return len(GROUPS[self.group][0]) + 1

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Batch:
        random = row_generator(self.seed, self.split, index)
        products, every = GROUPS[self.group]
        size = random.integers(self.lengths[0], self.lengths[1] + 1)
        word = random.integers(len(products), size=size)
        tokens = np.full(self.length, len(products), np.int32)
        tokens[:size] = word
        targets, segment_ids = np.zeros((2, self.length), np.int32)
        targets[:size] = list(itertools.accumulate(word, lambda state, element: products[state, element]))
        segment_ids[:size] = 1
        weights = np.zeros(self.length, np.float32)
        weights[0 if every else size - 1 : size] = 1
        return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "weights": weights}

    def digest(self, count: int = 64) -> str:
        """A hash of the first rows."""
        return rows_digest(self, count)
