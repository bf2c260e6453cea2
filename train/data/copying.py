"""Copying, the task of Jelassi et al., arXiv 2402.01032.

    start  s_1 ... s_n  separator  s_1 ... s_n  end

The string is of random letters, each of `symbols` as likely and independent, and n is uniform from the shortest length
to the longest. Targets are the next tokens; the weights are 1 on the repeat and the end mark, n + 1 targets, and 0
elsewhere. A row is one string, padded at its right to what the longest takes.

A string counts as copied where all its targets are the likeliest tokens. With the true prefix given (teacher forcing)
that is the same event as a greedy generation that reproduces the string: up to the first mistake, the prefixes are the
same. The share of single characters is not the same: behind a mistake, a generation reads its own.

Trained at lengths up to 50 and read at up to 1,000, a fixed state fails past some length by counting: n letters of 26
take n log2(26) bits.
"""

from dataclasses import dataclass

import numpy as np

from train.data.rows import Batch, make_row
from train.data.synthetic import SplitName, row_generator, rows_digest
from train.errors import UserError


@dataclass(frozen=True)
class CopyingRows:
    """Rows of the task.

    Attributes:
      seed: with the split and a row's index, what the row is a function of.
      split: `train` or `held_out`.
      num_rows: how many rows there are.
      lengths: (shortest, longest) string.
      symbols: letters of the alphabet, tokens 0 to `symbols` - 1; start, separator, end and padding come after them.

    Raises:
      UserError: sizes that do not fit.
    """

    seed: int
    split: SplitName
    num_rows: int
    lengths: tuple[int, int]
    symbols: int = 26

    def __post_init__(self) -> None:
        if not 1 <= self.lengths[0] <= self.lengths[1]:
            raise UserError(f"lengths={self.lengths} must be a range (shortest, longest) from 1")
        if self.symbols < 1:
            raise UserError(f"symbols={self.symbols} must be at least 1")

    @property
    def length(self) -> int:
        """T, the tokens of the longest string's row, its last target not counted."""
        return 2 * self.lengths[1] + 2

    @property
    def num_tokens(self) -> int:
        """How many token values there are."""
        return self.symbols + 4

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Batch:
        random = row_generator(self.seed, self.split, index)
        size = random.integers(self.lengths[0], self.lengths[1] + 1)
        string = random.integers(self.symbols, size=size)
        start, separator, end, padding = range(self.symbols, self.symbols + 4)
        tokens = np.concatenate([[start], string, [separator], string, [end]])
        row = make_row(tokens, np.ones(tokens.size), self.length, padding)
        weights = np.zeros(self.length, np.float32)
        weights[size + 1 : 2 * size + 2] = 1
        return row | {"weights": weights}

    def digest(self, count: int = 64) -> str:
        """A hash of the first rows."""
        return rows_digest(self, count)
