"""The stages of the chunked form in Pallas Mosaic GPU, for Hopper: by score."""

from pallas_kernels.chunked.linear import LINEAR
from pallas_kernels.chunked.squared import SQUARED

STAGES = {"linear": LINEAR, "squared": SQUARED}
