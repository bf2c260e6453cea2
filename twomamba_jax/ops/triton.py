"""The kernels in Triton, for NVIDIA GPUs from compute capability 8.0 on.

Triton is heavy to import, and an extra: `dispatch` imports this module where these kernels are chosen.
"""

import sys

from pallas_kernels.chunked.crossovers import equal_products
from pallas_kernels.triton.chunked.stages import STAGES
from pallas_kernels.triton.decoding import fold, step
from pallas_kernels.triton.quadratic.kernels import KERNELS
from twomamba_jax.ops.kernels import Kernels

# Those of `ops.mosaic_gpu`: against XLA's chunked form these kernels have not been measured.
LONGEST = {"linear": 16384, "squared": 131072, "exp": sys.maxsize}


def crossover(score: str, head_dim: int, sequences: int) -> int:
    """The tokens up to which the quadratic kernels are the fastest: where both do the same number of products."""
    return equal_products(STAGES[score].chunk, STAGES[score].rows(head_dim))


TRITON = Kernels(KERNELS, STAGES, step, fold, {}, LONGEST, crossover)
