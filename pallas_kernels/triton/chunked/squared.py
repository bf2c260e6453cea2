"""The stages of the squared score in Triton."""

from pallas_kernels.chunked.squared_stages import squared_stages
from pallas_kernels.triton.chunked.gradient import gradient
from pallas_kernels.triton.chunked.normalizer import normalizer
from pallas_kernels.triton.chunked.query import query
from pallas_kernels.triton.chunked.scan import scan
from pallas_kernels.triton.chunked.tiles import CHUNK_MULTIPLE
from pallas_kernels.triton.chunked.update import update

SQUARED = squared_stages(
    update=update,
    normalizer=normalizer,
    query=query,
    gradient=gradient,
    scan=scan,
    tiles=None,
    multiple=lambda _: CHUNK_MULTIPLE,
)
