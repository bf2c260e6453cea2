"""The stages of the chunked form in Triton: by score."""

from pallas_kernels.triton.chunked.linear import LINEAR
from pallas_kernels.triton.chunked.squared import SQUARED

STAGES = {"linear": LINEAR, "squared": SQUARED}
