"""Held-out loss and accuracy, weighted by token over all batches."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from train.data import Batch
from train.errors import UserError
from train.step import Sums


def evaluate(eval_step: Callable[[Any, Batch], Sums], params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Metrics of `params` over `batches`: eval/loss in nats a token, its perplexity and bits, eval/accuracy.

    With byte tokens the bits are per byte; the end of a document counts as one more byte. Raises UserError where the
    batches hold no target with a weight.
    """
    totals = np.zeros(3)  # float64: a large split has more tokens than float32 counts
    for batch in batches:
        totals += np.array(eval_step(params, batch), np.float64)
    loss, correct, weight = totals.tolist()
    if weight == 0:
        raise UserError("the held-out split has no token to predict: its documents are too short")
    loss /= weight
    return {
        "eval/loss": loss,
        "eval/accuracy": correct / weight,
        "eval/perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float64 above 709
        "eval/bits_per_byte": loss / math.log(2),
    }
