"""The kernels in Pallas Mosaic GPU, for Hopper.

They are heavy to import, and not there on every platform: `dispatch` imports this module where a device has them.
"""

import sys

from pallas_kernels.chunked import crossovers
from pallas_kernels.chunked.mosaic_gpu import STAGES
from pallas_kernels.decoding import fold, step
from pallas_kernels.device import device_kind
from pallas_kernels.elementwise import convolution, norm, softmax, swiglu
from pallas_kernels.quadratic.mosaic_gpu import KERNELS
from twomamba_jax.ops.kernels import Kernels

ELEMENTWISE = {"norm": norm, "convolution": convolution, "swiglu": swiglu, "loss": softmax}

# Measured on one H200: docs/kernels.md.
LONGEST = {"linear": 16384, "squared": 131072, "exp": sys.maxsize}


def crossover(score: str, head_dim: int, sequences: int) -> int:
    """The tokens up to which the quadratic kernels are the fastest, for `sequences` = B H."""
    measured = crossovers.crossover(device_kind(), score, head_dim, "forward+backward", sequences)
    return measured or crossovers.equal_products(STAGES[score].chunk, STAGES[score].rows(head_dim))


MOSAIC_GPU = Kernels(KERNELS, STAGES, step, fold, ELEMENTWISE, LONGEST, crossover)
