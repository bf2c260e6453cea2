"""What the quadratic kernels are told of decays and segments, made once for both directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.device import in_32_bits
from pallas_kernels.quadratic.operands import Decay


class Context(NamedTuple):
    """Sums of decays and edges of segments; None without them.

    decays: the sums in chunks of so many tokens as a program owns, by that number. segment: [B, T] int32, the number of
    each token's segment. first_visible, last_visible: [B, T] int32, the first and the last token of each token's
    segment.
    """

    decays: dict[int, Decay] | None
    segment: jax.Array | None
    first_visible: jax.Array | None
    last_visible: jax.Array | None

    @staticmethod
    @in_32_bits
    def make(log_decay, segment, tuning) -> "Context":
        """Of log_decay [B, T, G] float32 and segment [B, T] int32, either None, for kernels with this tuning."""
        owns = sorted({tuning.forward.own, tuning.queries.own, tuning.keys.own})
        decays = None if log_decay is None else {own: Decay.make(log_decay, own) for own in owns}
        if segment is None:
            return Context(decays, None, None, None)
        return Context(decays, segment, first_visible(segment), last_visible(segment))

    def decay(self, own: int) -> Decay | None:
        """The sums for a kernel whose programs own so many tokens."""
        return None if self.decays is None else self.decays[own]


def first_visible(segment):
    """[B, T] int32: the first token of each token's segment."""
    token = jnp.arange(segment.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(starts, token, 0), axis=1)


def last_visible(segment):
    """[B, T] int32: the last token of each token's segment."""
    token = jnp.arange(segment.shape[1], dtype=jnp.int32)
    ends = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (0, 1)))
    return jax.lax.cummin(jnp.where(ends, token, segment.shape[1] - 1), axis=1, reverse=True)
