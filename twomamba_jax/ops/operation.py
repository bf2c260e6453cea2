"""What one call computes, apart from its arrays: the static description that every form and stage takes."""

import dataclasses
import math

from twomamba_jax.ops.numerics import SQUARED_SHIFT, ZERO_DENOMINATOR, Precision
from twomamba_jax.ops.score import FINITE_SCORES, SCORES, Score


@dataclasses.dataclass(frozen=True)
class Operation:
    """Score, normalisation and scale of a call, and the precision of its products."""

    score: Score
    normalize: bool
    scale: float
    precision: Precision = None

    @property
    def is_finite(self) -> bool:
        """Whether the score has a state of constant size."""
        return self.score in FINITE_SCORES

    @property
    def query_scale(self) -> float:
        """The factor on <q, k> before the score: `scale`, and the range shift of normalised squared scores."""
        return self.scale * (SQUARED_SHIFT if self._shifts else 1.0)

    @property
    def denominator_floor(self) -> float:
        """Weights that sum to less than this count as 0."""
        return ZERO_DENOMINATOR * (SQUARED_SHIFT**2 if self._shifts else 1.0)

    @property
    def _shifts(self) -> bool:
        return self.normalize and self.score == "squared"


def make_operation(
    head_dim: int, score: Score, normalize: bool, scale: float | None, precision: Precision
) -> Operation:
    """The operation, checked; a `scale` of None is 1 / sqrt(head_dim). Raises ValueError."""
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown: expected one of {', '.join(SCORES)}")
    if precision not in (None, "highest"):
        raise ValueError(f"precision={precision!r} is unknown: expected None or 'highest'")
    return Operation(score, bool(normalize), 1 / math.sqrt(head_dim) if scale is None else float(scale), precision)
