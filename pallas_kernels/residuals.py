"""What the backward passes need of the forward passes, by name, so that a policy of `jax.checkpoint` can keep it."""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "attention"


def named(*arrays):
    """The arrays (None among them) under `NAME`: if all are kept, the forward kernels run once.

    The barrier is for XLA, which in a loop over layers would run a kernel twice: to stack what it returns where it is
    to be kept, in place, and again for those who use it.
    """
    arrays = jax.lax.optimization_barrier(arrays)
    return tuple(x if x is None else checkpoint_name(x, NAME) for x in arrays)
