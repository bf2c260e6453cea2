"""What `attention.py` measures: its rows, their inputs and the function of each."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twomamba_jax import decay_attention
from twomamba_jax.ops.score import FINITE_SCORES, SCORES

FORWARD, BOTH = "forward", "forward+backward"
LONGEST_BOTH = 131072  # above it, forward only


class Attention(NamedTuple):
    """One way to compute attention: the arguments of `decay_attention`, and the scores that it has.

    by_features: squared scores may be computed as sums of K^2 products of features.
    """

    implementation: str | None = None
    form: str | None = None
    scores: tuple[str, ...] = SCORES
    by_features: bool = False


CUDNN = "cudnn"  # jax.nn.dot_product_attention
ATTENTIONS = {
    CUDNN: Attention(scores=("exp",)),
    "quadratic": Attention("mosaic_gpu", "parallel"),
    "chunked": Attention("mosaic_gpu", "chunked", FINITE_SCORES, by_features=True),
    "xla": Attention("xla", "chunked", by_features=True),
    "triton-quadratic": Attention("triton", "parallel"),
    "triton-chunked": Attention("triton", "chunked", FINITE_SCORES, by_features=True),
}
OF_HOPPER = tuple(name for name, attention in ATTENTIONS.items() if attention.implementation != "triton")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      attention: a key of ATTENTIONS.
      decay: log decays are uniform from here to 0; None: there are none.
      milliseconds: the median of the runs.
      clock: cupti: the kernels' time on the device; wall: the whole call's.
      temporary_bytes: of the compiled program.
      peak_bytes: these, its arguments and its outputs.
      kernels: milliseconds of each kernel of a run, where they are asked for.
      note: why there is no measurement.
    """

    attention: str
    score: str
    direction: str
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    decay: float | None
    milliseconds: float | None = None
    runs: int = 0
    clock: str = ""
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    error_over_bound: float | None = None
    kernels: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)
    note: str = ""

    @property
    def label(self) -> str:
        """What it is called in tables and plots."""
        return "cuDNN softmax" if self.attention == CUDNN else f"{self.score}, {self.attention}"


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """What is to be measured, by length and direction."""
    for tokens, direction, attention in itertools.product(options.tokens, options.directions, options.rows):
        if (direction == "both" and tokens > LONGEST_BOTH) or (attention == "xla" and tokens not in options.xla_tokens):
            continue
        cudnn = attention == CUDNN
        for score in ATTENTIONS[attention].scores:
            if cudnn or score in options.scores:
                sizes = tokens, max(options.total // tokens, 1), options.heads, options.kv_heads, options.head_dim
                decay = None if cudnn or options.no_decay else options.decay
                yield Row(attention, score, BOTH if direction == "both" else FORWARD, *sizes, decay)


def make_inputs(row: Row, seed: int) -> tuple[jax.Array | None, ...]:
    """q, k, v, log_decay and a cotangent of y; for every row of a length the same ones."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), row.tokens), 5)
    heads = row.heads, row.kv_heads, row.kv_heads, row.heads
    shapes = [(row.batch, row.tokens, count, row.head_dim) for count in heads]
    q, k, v, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))
    if row.score == "linear":  # normalised, it asks for scores >= 0
        q, k = abs(q), abs(k)
    if row.decay is None:
        return q, k, v, None, dy
    return q, k, v, jax.random.uniform(keys[4], k.shape[:3], jnp.float32, minval=row.decay, maxval=0), dy


def function_of(row: Row) -> Callable:
    """(q, k, v, log_decay, dy) -> [y] or [y, dq, dk, dv, dlog_decay]; log_decay and its gradient may be None."""
    attention = ATTENTIONS[row.attention]

    def forward(q, k, v, log_decay):
        if row.attention == CUDNN:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        form, implementation = attention.form, attention.implementation
        return decay_attention(q, k, v, log_decay, score=row.score, form=form, implementation=implementation)

    def both(*arrays):
        y, pull = jax.vjp(forward, *arrays[:4])
        return [y, *pull(arrays[4])]

    return both if row.direction == BOTH else lambda *arrays: [forward(*arrays[:4])]
