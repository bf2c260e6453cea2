"""A name for what is small or cheap to keep, so that a policy of `jax.checkpoint` need not have it computed again.

Without it the backward pass reads its sources again: the float32 weights to cast them, the activations to sum their
squares. Names change no value.
"""

from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.residuals import SMALL
from twomamba_jax.shapes import AnyArray


def kept(x: AnyArray) -> AnyArray:
    """x, which a rematerialised block with `remat="dots"` keeps."""
    return checkpoint_name(x, SMALL)


def kept_cast(x: AnyArray, dtype) -> AnyArray:
    """x in `dtype`, kept where that is another than its own: otherwise it would be a copy of a parameter."""
    return x if x.dtype == dtype else kept(x.astype(dtype))
