"""The stages of the linear score: a feature is an entry of the key, and a state one K x V matrix.

Its kernels are bound by memory, so that they read every token's vectors once, weigh them in registers and write nothing
but their results. The normaliser is a vector, summed and read in float32.
"""

from pallas_kernels.chunked.stages import Stages, StateArrays, States
from pallas_kernels.chunked.state_scan import make_scan
from pallas_kernels.triton.chunked.linear_gradient import gradient
from pallas_kernels.triton.chunked.linear_query import query
from pallas_kernels.triton.chunked.linear_update import update
from pallas_kernels.triton.chunked.scan import scan
from pallas_kernels.triton.chunked.tiles import CHUNK_MULTIPLE


def _add(problem, x, w, weight, factor):
    return update(problem, x, w, weight, factor=None if factor is weight else factor)


def _query(problem, x, states: States, weight, added, power=1.0, own_norm=None, floor=0.0):
    own = {} if own_norm is None else {"normalizer": states.normalizer, "own_norm": own_norm, "floor": floor}
    return query(problem, x, states.kv, weight, added, power=power, **own)


def _gradient(problem, x, w, weight, states: States, added, factor, want_sums):
    own = {} if factor is None else {"normalizer": states.normalizer, "factor": factor}
    return gradient(problem, x, w, weight, states.kv, added, want_sums=want_sums, **own)


LINEAR = Stages(
    degree=1,
    head_dims=(64, 128),
    rows=lambda head_dim: head_dim,
    chunk=512,
    tiles=None,
    multiple=lambda _: CHUNK_MULTIPLE,
    pack=tuple,
    unpack=StateArrays,
    add=_add,
    scan=make_scan(scan),
    query=_query,
    gradient=_gradient,
)
