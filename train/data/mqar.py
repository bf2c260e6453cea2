"""Multi-query associative recall (MQAR): the task of zoology, Arora et al., arXiv 2312.04927.

    k_1 v_1 ... k_N v_N   filler and the N keys once more, each a query for the value that followed it

The keys are distinct tokens of the vocabulary's first half (token 0, the filler, is none of them), the values distinct
tokens of the second. Behind the pairs, a query may stand at every other position; the N of them are drawn without
replacement, slot s = 0, 1, ... with a probability that falls as (s + 1)^(power_a - 1), key by key: at 0.01, as
published, most queries come soon after the pairs, and gaps have the power law of words that come back in a text. At
power_a 1 all slots are as likely.

Targets are not the next tokens: a query's target is its value, with a weight of 1, and what follows it is filler. Every
other position has a weight of 0 and a target of 0.

Settings with published figures (vocabulary 8,192, filler 0, power_a 0.01): T and N of 64 and 4, 128 and 8, 256 and 16;
and, in Log-Linear Attention (arXiv 2506.04761), T 256 with 4 to 64 pairs, taken here as equal shares of 4, 8, 16, 32
and 64, `pairs=(4, 8, 16, 32, 64)`.
"""

import functools
from dataclasses import dataclass

import numpy as np

from train.data.rows import Batch
from train.data.synthetic import SplitName, row_generator, rows_digest
from train.errors import UserError


@dataclass(frozen=True)
class MQARRows:
    """Rows of the task; row i has the i-th number of pairs, cyclically, of `pairs`.

    Attributes:
      seed: with the split and a row's index, what the row is a function of.
      split: `train` or `held_out`.
      length: T, at least 4 N.
      num_rows: how many rows there are.
      pairs: N, one number or several; equally many rows have each.
      vocab_size: of which floor(vocab_size / 2) - 1 tokens are keys.
      power_a: exponent of the gaps' law, plus 1.
      random_filler: whether positions that are neither pairs nor queries hold any token of the vocabulary, and not 0.

    Raises:
      UserError: sizes that do not fit.
    """

    seed: int
    split: SplitName
    length: int
    num_rows: int
    pairs: tuple[int, ...]
    vocab_size: int = 8192
    power_a: float = 0.01
    random_filler: bool = False

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1:
            raise UserError(f"pairs={self.pairs} must be one or more numbers of at least 1")
        if 4 * max(self.pairs) > self.length:
            raise UserError(
                f"length={self.length} is too short for pairs={max(self.pairs)}: it must be at least "
                f"{4 * max(self.pairs)}, four tokens a pair"
            )
        if self.vocab_size // 2 - 1 < max(self.pairs):
            raise UserError(
                f"vocab_size={self.vocab_size} is too small for pairs={max(self.pairs)}: distinct keys and token 0 "
                f"take half of at least {2 * max(self.pairs) + 2}"
            )
        if not self.power_a > 0:
            raise UserError(f"power_a={self.power_a} must be positive; 1 makes all gaps as likely")

    @property
    def num_tokens(self) -> int:
        """How many token values there are."""
        return self.vocab_size

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Batch:
        random = row_generator(self.seed, self.split, index)
        pairs, half = self.pairs[index % len(self.pairs)], self.vocab_size // 2
        keys = 1 + random.choice(half - 1, pairs, replace=False)
        values = half + random.choice(self.vocab_size - half, pairs, replace=False)
        chances = slot_chances((self.length - 2 * pairs) // 2, self.power_a)
        queries = 2 * pairs + 2 * random.choice(chances.size, pairs, replace=False, p=chances)

        tokens, targets = np.zeros((2, self.length), np.int32)
        if self.random_filler:
            tokens[:] = random.integers(self.vocab_size, size=self.length)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        tokens[queries], targets[queries] = keys, values
        weights = np.zeros(self.length, np.float32)
        weights[queries] = 1
        return {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": np.ones(self.length, np.int32),
            "weights": weights,
        }

    def digest(self, count: int = 64) -> str:
        """A hash of the first rows."""
        return rows_digest(self, count)


@functools.cache
def slot_chances(slots: int, power_a: float) -> np.ndarray:
    """The probability that a query is drawn into each slot, while all of them are free."""
    chances = np.arange(1, slots + 1) ** (power_a - 1.0)
    return chances / chances.sum()
