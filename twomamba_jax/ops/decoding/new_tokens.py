"""What new tokens leave behind for a cache that has been read, and not written yet.

Reading and writing are apart so that the layers of a model, which run in a loop, can be written to together after it:
what goes in and out of such a loop is copied at every step.
"""

from typing import NamedTuple

from twomamba_jax.ops.state import FiniteState
from twomamba_jax.shapes import Array, Float, Int


class NewTokens(NamedTuple):
    """Tokens `skipped`, ..., `skipped` + `counts` - 1 of a call; what comes after them in the arrays is padding.

    `state` and `folded` replace those of a `RecurrentCache` (None: they stay); `start` replaces that of a
    `KeyValueCache`.
    """

    keys: Float[Array, "B G N K"]
    values: Float[Array, "B G N V"]
    log_decay: Float[Array, "B G N"] | None
    skipped: Int[Array, "B"]
    counts: Int[Array, "B"]
    state: FiniteState | None = None
    folded: Int[Array, "B"] | None = None
    start: Int[Array, "B"] | None = None
