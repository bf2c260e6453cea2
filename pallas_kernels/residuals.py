"""What the backward passes need of the forward passes, by name, so that a policy of `jax.checkpoint` can keep it.

`NAME` is for the results of attention and what goes with them, `STATES` for the states between chunks, `SMALL` for what
the kernels are told beside q, k and v, and what else is small or cheap to keep.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "attention"
STATES = "states"
SMALL = "small"


def named(*arrays, name=NAME):
    """The arrays (None among them) under a name: if all are kept, the kernels that make them run once.

    The barrier is for XLA, which in a loop over layers would run a kernel twice: to stack what it returns where it is
    to be kept, in place, and again for those who use it.
    """
    arrays = jax.lax.optimization_barrier(arrays)
    return tuple(x if x is None else checkpoint_name(x, name) for x in arrays)


def named_small(tree):
    """The arrays of a pytree under `SMALL`: if they are kept, they are made once for both passes."""
    return jax.tree.map(lambda x: checkpoint_name(x, SMALL), tree)
