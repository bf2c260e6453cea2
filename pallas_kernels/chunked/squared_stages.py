"""The stages of the squared score, whatever computes them: features are products of two, in the tiles of `layout`."""

from collections.abc import Callable
from typing import Any

from pallas_kernels.chunked.layout import HEAD_DIM, TILES, block_multiplicity
from pallas_kernels.chunked.squared_state import pack_state, scaled, unpack_state
from pallas_kernels.chunked.stages import Stages, States
from pallas_kernels.chunked.state_scan import make_scan


def squared_stages(
    *,
    update: Callable,
    normalizer: Callable,
    query: Callable,
    gradient: Callable,
    scan: Callable,
    tiles: Any,
    multiple: Callable[[Any], int],
) -> Stages:
    """The stages that these kernels make; `tiles` and `multiple` as in `Stages`.

    Args:
      update: (problem, x, w) -> sum_t phi(x_t) w_t^T of each chunk, float32.
      normalizer: (problem, x, factor) -> sum_t factor_t x_t x_t^T of each chunk [B, G, N, 64, 64] float32.
      query: (problem, x, kv, weight, added, power, normalizer, own_norm, floor), as in `query.query`.
      gradient: (problem, x, w, kv, added, want_sums, normalizer, factor), as in `gradient.gradient`.
      scan: as in `scan.scan`.
    """

    def add(problem, x, w, weight, factor):
        return update(problem, x, scaled(w, weight)), normalizer(problem, x, factor)[:, :, :, None]

    def parts(states: States):
        """[B, G, N, 2, 64, 64]."""
        return states.normalizer[:, :, :, :, 0]

    def read(problem, x, states: States, weight, added, power=1.0, own_norm=None, floor=0.0):
        own = {}
        if own_norm is not None:
            own = {"normalizer": parts(states), "own_norm": own_norm, "floor": floor}
        return query(problem, x, states.kv, weight, added, power=power, **own)

    def differentiate(problem, x, w, weight, states: States, added, factor, want_sums):
        own = {} if factor is None else {"normalizer": parts(states), "factor": factor}
        return gradient(problem, x, scaled(w, weight), states.kv, added, want_sums=want_sums, **own)

    return Stages(
        degree=2,
        head_dims=(HEAD_DIM,),
        rows=lambda head_dim: TILES * HEAD_DIM,
        chunk=1024,
        tiles=tiles,
        multiple=multiple,
        pack=pack_state,
        unpack=unpack_state,
        add=add,
        scan=make_scan(scan, counts=block_multiplicity(), parts=2),
        query=read,
        gradient=differentiate,
    )
