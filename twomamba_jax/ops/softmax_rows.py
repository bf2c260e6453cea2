"""What a cross entropy and its gradient take of each row of logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.shapes import Array, Float, Int


class Rows(NamedTuple):
    """Of each row l: the largest, sum exp(l - largest), the place of the first largest, and l_target; the last is 0
    for a target that is no place of the row.
    """

    largest: Float[Array, "*rows"]
    total: Float[Array, "*rows"]
    first_largest: Int[Array, "*rows"]
    of_target: Float[Array, "*rows"]


def softmax_rows(logits: Float[Array, "R Q C vocab"], targets: Int[Array, "R Q C"], elementwise: Elementwise) -> Rows:
    """`Rows` of the logits, in their dtype and without a gradient, by a kernel where there is one.

    Args:
      logits: [R, Q, C, vocab] of R x Q shares of the tokens, R sharded as the batch is and Q as its tokens are.
      targets: [R, Q, C].
      elementwise: the kernels; a sharded vocabulary has none.
    """
    batch, length, vocabulary = elementwise.axes()
    spec = PartitionSpec(batch, length)
    kernels = elementwise.kernels("loss", (logits, spec), whole=[("tokens of the vocabulary", vocabulary)])
    if kernels is None:
        return jax.lax.platform_dependent(logits, targets, cuda=in_one_pass, default=in_several_passes)

    def call(logits, targets):
        rows = kernels.softmax_rows(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).astype(jnp.int32))
        return Rows(*(part.reshape(targets.shape) for part in rows))

    return elementwise.shard(call, (spec, spec), spec)(logits, targets)


def in_several_passes(logits, targets) -> Rows:
    """`Rows` of logits [..., V], as XLA computes them fastest on a CPU."""
    largest, places = jnp.max(logits, axis=-1), places_of(logits)
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    first = jnp.min(jnp.where(logits == largest[..., None], places, logits.shape[-1]), axis=-1)
    return Rows(largest, total, first, jnp.sum(jnp.where(places == targets[..., None], logits, 0), axis=-1))


def in_one_pass(logits, targets) -> Rows:
    """`Rows` with the logits read once, as a GPU should; XLA's code for a CPU takes three times as long by it.

    Two parts of a row with largest m and n and sums s and r have the sum s exp(m - largest) + r exp(n - largest).
    """
    places = places_of(logits)
    zero = jnp.zeros((), logits.dtype)
    parts = logits, jnp.ones_like(logits), places, jnp.where(places == targets[..., None], logits, zero)
    # Not -inf, of which two have no difference: nothing is 0 times exp(0).
    nothing = jnp.finfo(logits.dtype).min.astype(logits.dtype), zero, jnp.int32(logits.shape[-1]), zero

    def join(a: Rows, b: Rows) -> Rows:
        largest = jnp.maximum(a.largest, b.largest)
        total = a.total * jnp.exp(a.largest - largest) + b.total * jnp.exp(b.largest - largest)
        of_equals = jnp.minimum(a.first_largest, b.first_largest)
        of_two = jnp.where(a.largest > b.largest, a.first_largest, b.first_largest)
        first = jnp.where(a.largest == b.largest, of_equals, of_two)
        return Rows(largest, total, first, a.of_target + b.of_target)

    return jax.lax.reduce(Rows(*parts), Rows(*nothing), join, (logits.ndim - 1,))


def places_of(logits: Array) -> Array:
    """The place of each logit in its row. Comparisons with it, over a sharded vocabulary, are each device's own."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
