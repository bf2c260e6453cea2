"""Held-out loss and accuracy, weighted by token over all batches."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from train.cross_entropy import Sums
from train.data.rows import Batch
from train.errors import UserError


def evaluate(
    eval_step: Callable[[Any, Batch], Sums], params: Any, batches: Iterable[Batch], targets_per_byte: float | None
) -> dict[str, float]:
    """Metrics of `params` over `batches`: eval/loss in nats a token, its perplexity, eval/accuracy, and bits per byte.

    The bits of a byte of text are those of a token times `targets_per_byte` of the whole held-out text; None where the
    data is no text, which has no such figure. Raises UserError where the batches hold no target with a weight.
    """
    totals = np.zeros(3)  # float64: a large split has more tokens than float32 counts
    for batch in batches:
        totals += np.array(eval_step(params, batch), np.float64)
    loss, correct, weight = totals.tolist()
    if weight == 0:
        raise UserError("the held-out split has no token to predict: its documents are too short")
    loss /= weight
    figures = {
        "eval/loss": loss,
        "eval/accuracy": correct / weight,
        "eval/perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float64 above 709
    }
    if targets_per_byte is not None:
        figures["eval/bits_per_byte"] = loss / math.log(2) * targets_per_byte
    return figures
