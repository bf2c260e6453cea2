"""The stages of the chunked form in Triton: by score."""

from pallas_kernels.triton.chunked.squared import SQUARED

STAGES = {"squared": SQUARED}
