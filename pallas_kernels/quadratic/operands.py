"""What the quadratic kernels are told of a call: its sizes and constants, its decays and its segments."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
SMALLEST_DECAY = -126.0  # log2 of what a float32 holds in full; in Mosaic's kernels smaller decays are 0
HEADROOM = 32  # log2 of how much smaller the weights of normalised powers are made in the keys' kernel; even


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, apart from its arrays.

    The query (in the keys' kernel the key, by `key_power`) is multiplied by `query_power`, a power of two and so exact
    in bfloat16, before their product; the rest of the scale is `logit_scale` (exp) or `output_scale` (the other scores,
    where they are not normalised).
    """

    batch: int
    tokens: int  # a multiple of 8
    heads: int
    kv_heads: int
    head_dim: int
    score: str
    normalize: bool
    query_power: float
    logit_scale: float  # of <q, k> query_power, in units of log 2
    output_scale: float
    floor: float  # row sums below it count as 0
    interpret: bool

    def tiles(self, block: int) -> int:
        """Tiles of `block` rows per head."""
        return -(-self.tokens // block)

    def late_scale(self, has_decay: bool) -> float | None:
        """What the forward kernel multiplies logits of exp by when they count from their row's largest; None: before.

        That is a positive scale, without a decay. Before, compilers make one instruction of it and the difference: of
        the largest logit that leaves its own rounding, which of 2^32 or more is no exponent.
        """
        late = self.score == "exp" and self.normalize and not has_decay and self.logit_scale > 0
        return self.logit_scale if late else None

    @property
    def key_power(self) -> float:
        """What keys are multiplied by in their own kernel, a power of two: `query_power`, less the headroom.

        A weight of a normalised row is at most 1, and up to 2^126 as it was at the end of its key's tile. Of weights
        2^-32 times as large any number can be added up; slopes, which are weights over scores, are small enough as it
        is, by the floor of the rows' sums. It is taken from the score and not from what multiplies it, which of scores
        of 2^60 is itself as small as a float32 can be; `key_scales` give it back.
        """
        return self.query_power * 2.0 ** -(self._headroom // self._degree)

    @property
    def key_scales(self) -> tuple[float, float]:
        """The factors between what the keys' kernel sums and dk; and dv, and the sums of W."""
        lessened = 2.0 ** (self._headroom - self._headroom // self._degree)
        return self.gradient_scale * lessened, self.output_scale * 2.0**self._headroom

    @property
    def _degree(self) -> int:
        return 2 if self.score == "squared" else 1

    @property
    def _headroom(self) -> int:
        return HEADROOM if self.normalize and self.score != "exp" else 0

    @property
    def gradient_scale(self) -> float:
        """The factor between what the queries' kernel sums and dq; apart from the headroom also dk."""
        if self.score == "exp":
            return self.query_power * self.logit_scale / LOG2E
        return self.query_power * self.output_scale * self._degree


def slope_of(score: str, s, factor):
    """d weight / d s up to the constant `gradient_scale`, for the weight score(s) factor; None is 1.

    For `exp` the factor is the whole weight, e^s with everything that multiplies it. With ds = slope dL/dweight, the
    share of a pair in the gradient of the log decays between its two tokens is W = s ds (exp: ds).
    """
    if score == "squared":
        return s if factor is None else s * factor
    return factor


class Decay(NamedTuple):
    """Sums of log2 decays within chunks of equal size, float32.

    prefix: [B, G, T padded], up to and with a token; suffix: the same shape, after it, to the chunk's end; total:
    [B, G, chunks], of a chunk.
    """

    prefix: jax.Array
    suffix: jax.Array
    total: jax.Array

    @staticmethod
    def make(log_decay, chunk: int) -> "Decay":
        """From log_decay [B, T, G], padded with no decay. Only terms of one sign are added: nothing cancels."""
        batch, tokens, heads = log_decay.shape
        chunks = -(-tokens // chunk)
        x = jnp.moveaxis(log_decay, 1, 2) * LOG2E
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * chunk - tokens))).reshape(batch, heads, chunks, chunk)
        up_to = jnp.arange(chunk)[:, None] <= jnp.arange(chunk)
        prefix = jnp.einsum("bgcs,st->bgct", x, up_to.astype(x.dtype), precision="highest")
        suffix = jnp.einsum("bgcs,st->bgct", x, 1 - up_to.astype(x.dtype), precision="highest")
        flat = (batch, heads, chunks * chunk)
        return Decay(prefix.reshape(flat), suffix.reshape(flat), prefix[..., -1])
