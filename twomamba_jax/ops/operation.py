"""What one call computes, apart from its arrays: the static description that every form and stage takes."""

import dataclasses
import math

from twomamba_jax.ops.numerics import ZERO_DENOMINATOR, Precision
from twomamba_jax.ops.score import SCORES, FiniteScore, Score, score_spec


@dataclasses.dataclass(frozen=True)
class Operation:
    """Score, normalisation and scale of a call, and the precision of its products."""

    score: Score
    normalize: bool
    scale: float
    precision: Precision = None

    @property
    def finite(self) -> FiniteScore | None:
        """The score's features; None where it has no state of constant size."""
        return SCORES[self.score].finite

    @property
    def query_scale(self) -> float:
        """The factor on <q, k> before the score: `scale`, and the range shift of normalised scores."""
        return self.scale * self._shift

    @property
    def denominator_floor(self) -> float:
        """Weights that sum to less than this count as 0."""
        return ZERO_DENOMINATOR * (self._shift**self.finite.degree if self.finite else 1.0)

    @property
    def _shift(self) -> float:
        return self.finite.shift if self.normalize and self.finite else 1.0


def make_operation(
    head_dim: int, score: Score, normalize: bool, scale: float | None, precision: Precision
) -> Operation:
    """The operation, checked; a `scale` of None is 1 / sqrt(head_dim). Raises ValueError."""
    score_spec(score)
    if precision not in (None, "highest"):
        raise ValueError(f"precision={precision!r} is unknown: expected None or 'highest'")
    return Operation(score, bool(normalize), 1 / math.sqrt(head_dim) if scale is None else float(scale), precision)
