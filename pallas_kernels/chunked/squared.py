"""The stages of the squared score: features are products of two, in the tiles of `layout`."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunked.gradient import gradient
from pallas_kernels.chunked.layout import (
    HEAD_DIM,
    TILES,
    multiplicity,
    pack,
    pack_normalizer,
    unpack,
    unpack_normalizer,
)
from pallas_kernels.chunked.normalizer import normalizer
from pallas_kernels.chunked.problem import Tiles
from pallas_kernels.chunked.query import query
from pallas_kernels.chunked.scan import scan
from pallas_kernels.chunked.stages import Stages, StateArrays, States
from pallas_kernels.chunked.update import update


def _pack(state: StateArrays):
    """Tiles [B, G, 40, 64, V], and the normaliser as a matrix [B, G, 1, 64, 64]."""
    return pack(state.kv), pack_normalizer(state.key_sum)[:, :, None]


def _unpack(kv, matrix) -> StateArrays:
    return StateArrays(unpack(kv), unpack_normalizer(matrix[:, :, 0]))


def _add(problem, x, w, weight, factor):
    return update(problem, x, _scaled(w, weight)), normalizer(problem, x, factor)[:, :, :, None]


def _query(problem, x, states: States, weight, added, power=1.0, own_norm=None, floor=0.0):
    own = {}
    if own_norm is not None:
        own = {"normalizer": _two_parts(states.normalizer), "own_norm": own_norm, "floor": floor}
    return query(problem, x, states.kv, weight, added, power=power, **own)


def _gradient(problem, x, w, weight, states: States, added, factor, want_sums):
    own = {} if factor is None else {"normalizer": _two_parts(states.normalizer), "factor": factor}
    return gradient(problem, x, _scaled(w, weight), states.kv, added, want_sums=want_sums, **own)


def _inner(states: States, dstates: States, with_normalizer: bool):
    total = jnp.einsum(
        "bgntrv,bgntrv,tr->bgn", states.kv, dstates.kv, multiplicity(), preferred_element_type=jnp.float32
    )
    if with_normalizer:
        total = total + (states.normalizer * dstates.normalizer).sum((-3, -2, -1))
    return total


def _scaled(w, weight):
    """weight w, in w's dtype."""
    if weight is None:
        return w
    return (w.astype(jnp.float32) * jnp.moveaxis(weight, 1, 2)[..., None]).astype(w.dtype)


def _two_parts(matrix):
    """[B, G, N, 1, 64, 64] float32 as a sum of two bfloat16 matrices, [B, G, N, 2, 64, 64].

    The compiler may drop conversions there and back, not `reduce_precision`.
    """
    high = jax.lax.reduce_precision(matrix, exponent_bits=8, mantissa_bits=7)
    return jnp.concatenate([high.astype(jnp.bfloat16), (matrix - high).astype(jnp.bfloat16)], axis=3)


SQUARED = Stages(
    degree=2,
    head_dims=(HEAD_DIM,),
    rows=lambda head_dim: TILES * HEAD_DIM,
    chunk=1024,
    tiles=Tiles(),
    multiple=lambda tiles: tiles.rows,
    pack=_pack,
    unpack=_unpack,
    add=_add,
    scan=scan,
    query=_query,
    gradient=_gradient,
    inner=_inner,
)
