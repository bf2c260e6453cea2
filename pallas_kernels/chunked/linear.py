"""The stages of the linear score: a feature is an entry of the key, and a state one K x V matrix.

Its kernels are bound by memory, so that they read every token's vectors once, weigh them in registers and write nothing
but their results. The normaliser is a vector, summed and read in float32.
"""

from pallas_kernels.chunked.decays import TILE
from pallas_kernels.chunked.linear_gradient import gradient
from pallas_kernels.chunked.linear_query import query
from pallas_kernels.chunked.linear_update import update
from pallas_kernels.chunked.problem import Tiles
from pallas_kernels.chunked.scan import scan
from pallas_kernels.chunked.stages import Stages, StateArrays, States
from pallas_kernels.chunked.state_scan import make_scan

HEIGHT = 16  # rows of a tile of a state, which a program of `scan` carries: one head alone fills few multiprocessors
SIZE = 64  # entries of a tile of a normaliser


def _pack(state: StateArrays):
    """Tiles [B, G, K / 16, 16, V] and [B, G, K / 64, 64]."""
    kv, key_sum = state
    return kv.reshape(*kv.shape[:-2], -1, HEIGHT, kv.shape[-1]), key_sum.reshape(*key_sum.shape[:-1], -1, SIZE)


def _unpack(kv, normalizer) -> StateArrays:
    return StateArrays(kv.reshape(*kv.shape[:-3], -1, kv.shape[-1]), normalizer.reshape(*normalizer.shape[:-2], -1))


def _add(problem, x, w, weight, factor):
    return _pack(StateArrays(*update(problem, x, w, weight, factor=None if factor is weight else factor)))


def _query(problem, x, states: States, weight, added, power=1.0, own_norm=None, floor=0.0):
    kv, normalizer = _unpack(*states)
    own = {} if own_norm is None else {"normalizer": normalizer, "own_norm": own_norm, "floor": floor}
    return query(problem, x, kv, weight, added, power=power, **own)


def _gradient(problem, x, w, weight, states: States, added, factor, want_sums):
    kv, normalizer = _unpack(*states)
    own = {} if factor is None else {"normalizer": normalizer, "factor": factor}
    return gradient(problem, x, w, weight, kv, added, want_sums=want_sums, **own)


# Chunks of 512: forward a token moves 18 K bytes of its own and 12 K V / C of states, and costs 2 C K flops inside its
# chunk. At heads of 64 states are a twelfth of the bytes, and the flops take as long as the quadratic kernel's bytes:
# chunks of 1,024 would double the flops, of 256 the states, and the steps of the scan, which wait for each other.
LINEAR = Stages(
    degree=1,
    head_dims=(64, 128),
    rows=lambda head_dim: head_dim,
    chunk=512,
    tiles=Tiles(),
    multiple=lambda tiles: TILE,
    pack=_pack,
    unpack=_unpack,
    add=_add,
    scan=make_scan(scan),
    query=_query,
    gradient=_gradient,
)
