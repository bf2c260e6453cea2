"""A recall task: a string of random symbols that comes again after a gap. It shows the mixing at work.

    marker  s_1 ... s_N  filler ... filler  marker  s_1 ... s_N

A row holds such problems, each a segment of its own, until the next does not fit; the rest is padding. The N symbols
are distinct, the fillers are of an alphabet of their own, the length of the gap is random. The weights are 1 on the N
targets of the repeat and 0 elsewhere. Each of these is predictable by one rule, the first included, since the same
marker opens both strings: look up what followed this token before.

Held-out problems have strings of N symbols. With `graded`, training problems have strings and gaps of all lengths up to
the longest, the short ones more often. A model whose decay starts near 1/2 a token, as 2Mamba's does, sees only a few
tokens back at first: it learns the rule where it can see it work, and then stretches it.

Chance: with S symbols in all, a model that sees its current token alone is right 1 time in S - 1 at best (1 in S - 2
with a convolution of width 2): 1.6 % for S = 64. One that knows the set of the N symbols but nothing of their order
reaches (1 + 1/2 + ... + 1/N) / N: 12.7 % for N = 32.
"""

import math
from dataclasses import dataclass

import numpy as np

from train.data.rows import Batch
from train.data.synthetic import SplitName, row_generator, rows_digest
from train.errors import UserError


@dataclass(frozen=True)
class RecallRows:
    """Rows of the task; row i is a function of (seed, split, i). Raises UserError where the sizes do not fit."""

    seed: int
    split: SplitName
    length: int
    num_rows: int
    symbols: int
    repeat: int
    fillers: int
    gap: tuple[int, int]
    graded: bool

    def __post_init__(self) -> None:
        if not 1 <= self.repeat <= self.symbols:
            raise UserError(f"data.repeat={self.repeat} must be from 1 to data.symbols={self.symbols}, all distinct")
        if self.fillers < 1:
            raise UserError(f"data.fillers={self.fillers} must be at least 1")
        if [type(end) for end in self.gap] != [int, int] or not 0 <= self.gap[0] <= self.gap[1]:
            raise UserError(f"data.gap={self.gap} must be a range (shortest, longest)")
        if self.length < self.longest:
            raise UserError(
                f"length={self.length} is too short: the longest problem has {self.longest} tokens and a target"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest problem, its last target not counted."""
        return 2 * self.repeat + 1 + self.gap[1]

    @property
    def marker(self) -> int:
        """The token that opens both strings; the symbols and the fillers come before it, the padding after."""
        return self.symbols + self.fillers

    @property
    def num_tokens(self) -> int:
        """How many token values there are."""
        return self.marker + 2

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Batch:
        random = row_generator(self.seed, self.split, index)
        tokens = np.full(self.length + 1, self.marker + 1, np.int32)
        segment_ids = np.zeros(self.length + 1, np.int32)
        weights = np.zeros(self.length + 1, np.float32)
        start, (problem, repeat) = 0, self._draw(random)
        while start + problem.size <= self.length + 1:
            end = start + problem.size
            tokens[start:end] = problem
            segment_ids[start:end] = segment_ids.max() + 1
            weights[end - repeat : end] = 1
            start, (problem, repeat) = end, self._draw(random)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segment_ids": segment_ids[:-1],
            "weights": weights[1:],
        }

    def _draw(self, random: np.random.Generator) -> tuple[np.ndarray, int]:
        """The tokens of one problem, and how many of them, at its end, are the repeat."""
        if self.graded:
            repeat, gap_size = log_uniform(random, self.repeat), log_uniform(random, self.gap[1] + 1) - 1
        else:
            repeat, gap_size = self.repeat, random.integers(self.gap[0], self.gap[1] + 1)
        string = random.permutation(self.symbols)[:repeat]
        gap = self.symbols + random.integers(self.fillers, size=gap_size)
        return np.concatenate([[self.marker], string, gap, [self.marker], string]), repeat

    def digest(self, count: int = 64) -> str:
        """A hash of the first rows: another generator of random numbers, or another task, shows in it."""
        return rows_digest(self, count)


def log_uniform(random: np.random.Generator, longest: int) -> int:
    """A length from 1 to `longest`, n with a probability that falls as 1 / n."""
    return int(math.exp(random.uniform(0, math.log(longest + 1))))
