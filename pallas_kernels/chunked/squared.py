"""The stages of the squared score: features are products of two, in the tiles of `layout`."""

from pallas_kernels.chunked.gradient import gradient
from pallas_kernels.chunked.layout import HEAD_DIM, TILES
from pallas_kernels.chunked.normalizer import normalizer
from pallas_kernels.chunked.problem import Tiles
from pallas_kernels.chunked.query import query
from pallas_kernels.chunked.scan import scan
from pallas_kernels.chunked.squared_state import inner, pack_state, scaled, two_parts, unpack_state
from pallas_kernels.chunked.stages import Stages, States
from pallas_kernels.chunked.update import update


def _add(problem, x, w, weight, factor):
    return update(problem, x, scaled(w, weight)), normalizer(problem, x, factor)[:, :, :, None]


def _query(problem, x, states: States, weight, added, power=1.0, own_norm=None, floor=0.0):
    own = {}
    if own_norm is not None:
        own = {"normalizer": two_parts(states.normalizer), "own_norm": own_norm, "floor": floor}
    return query(problem, x, states.kv, weight, added, power=power, **own)


def _gradient(problem, x, w, weight, states: States, added, factor, want_sums):
    own = {} if factor is None else {"normalizer": two_parts(states.normalizer), "factor": factor}
    return gradient(problem, x, scaled(w, weight), states.kv, added, want_sums=want_sums, **own)


SQUARED = Stages(
    degree=2,
    head_dims=(HEAD_DIM,),
    rows=lambda head_dim: TILES * HEAD_DIM,
    chunk=1024,
    tiles=Tiles(),
    multiple=lambda tiles: tiles.rows,
    pack=pack_state,
    unpack=unpack_state,
    add=_add,
    scan=scan,
    query=_query,
    gradient=_gradient,
    inner=inner,
)
