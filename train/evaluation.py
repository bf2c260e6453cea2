"""Held-out loss and accuracy, weighted by token over all batches; and the loss by the length of the context."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.cross_entropy import Sums
from train.data.rows import Batch
from train.errors import UserError
from twomamba_jax.layers import head_kernel, head_logits


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


def token_losses(model: nn.Module, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of each target its negative log likelihood, float32 or wider, and whether it is the likeliest; both [B, T].

    The logits of one row exist at a time.
    """
    x = model.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"], apply_head=False)

    def row(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = pair
        logits = head_logits(hidden, head_kernel(params))
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == targets

    return jax.lax.map(row, (x, batch["targets"]))


class ContextLosses:
    """The mean loss of targets by how many tokens of their document the model has seen: 1, 2, 3 to 4, 5 to 8, ..."""

    def __init__(self) -> None:
        """No target has come."""
        self._sums: dict[int, np.ndarray] = {}

    def add(self, batch: Batch, losses: np.ndarray) -> None:
        """Adds the targets of a batch, by their weights; `losses` are [B, T]."""
        segments, weights = np.asarray(batch["segment_ids"]), np.asarray(batch["weights"], np.float64)
        position = np.arange(segments.shape[1])
        starts = np.ones(segments.shape, bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        context = position - np.maximum.accumulate(np.where(starts, position, 0), axis=1) + 1
        bucket = np.ceil(np.log2(context)).astype(int)
        for number in np.unique(bucket[weights > 0]).tolist():
            inside = np.where(bucket == number, weights, 0)
            sums = np.array([np.sum(inside * np.asarray(losses, np.float64)), np.sum(inside)])
            self._sums[number] = self._sums.get(number, 0) + sums

    def table(self) -> list[dict[str, float]]:
        """One record a range of contexts, `from` and `to` inclusive: its mean `loss` in nats and its `targets`."""
        return [
            {"from": 2 ** (number - 1) + 1 if number else 1, "to": 2**number, "loss": loss / weight, "targets": weight}
            for number, (loss, weight) in ((number, sums.tolist()) for number, sums in sorted(self._sums.items()))
        ]
