"""The stages of the squared score in Pallas Mosaic GPU."""

from pallas_kernels.chunked.gradient import gradient
from pallas_kernels.chunked.normalizer import normalizer
from pallas_kernels.chunked.problem import Tiles
from pallas_kernels.chunked.query import query
from pallas_kernels.chunked.scan import scan
from pallas_kernels.chunked.squared_stages import squared_stages
from pallas_kernels.chunked.update import update

SQUARED = squared_stages(
    update=update,
    normalizer=normalizer,
    query=query,
    gradient=gradient,
    scan=scan,
    tiles=Tiles(),
    multiple=lambda tiles: tiles.rows,
)
