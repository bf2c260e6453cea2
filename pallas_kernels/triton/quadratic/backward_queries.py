"""The gradient of the queries, and the row sums that the gradient of the decays needs."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.quadratic.pieces import load_tile, piece, store_tile
from pallas_kernels.triton.quadratic.tiles import Tiles, programs_of
from pallas_kernels.triton.quadratic.weights import slope_of


def backward_queries(problem: Problem, tiles: Tiles, q, k, v, dy, norm, delta, decay: Decay | None, first_visible):
    """dq [B, T, H, K] and, with a decay, sum_j W_ij [B, H, T padded to own]; W as in `quadratic.operands.slope_of`.

    The traversal is that of the forward kernel. norm is log2 of the row sums and delta <dy, y>, both [B, H, T padded to
    own]; None where nothing is normalised.
    """

    @batched
    def run(q, k, v, dy, norm, delta, decay, first_visible):
        batch, count = q.shape[0], problem.tiles(tiles.own)
        grid, group = programs_of(batch * problem.heads, count, 4 * problem.tokens * problem.head_dim)
        outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
        if decay is not None:
            outputs.append(jax.ShapeDtypeStruct((batch, problem.heads, count * tiles.own), jnp.float32))
        return call(
            queries_kernel,
            *(q, k, v, dy, norm, delta, *(decay or (None,) * 3), first_visible),
            out_type=tuple(outputs),
            grid=grid,
            name=f"{problem.score}_backward_queries",
            GROUP=group,
            GRADIENT_SCALE=problem.gradient_scale / problem.query_power,
            **tiles.constants(problem),
            **({"sums_ptr": None} if decay is None else {}),
        )

    return run(q, k, v, dy, norm, delta, decay, first_visible)


@triton.jit
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dy_ptr,
    norm_ptr,
    delta_ptr,
    prefix_ptr,
    suffix_ptr,
    total_ptr,
    first_ptr,
    dq_ptr,
    sums_ptr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    GRADIENT_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    OWN: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """See `backward_queries`."""
    DECAY: tl.constexpr = prefix_ptr is not None
    TILES: tl.constexpr = (TOKENS + OWN - 1) // OWN
    PER_TILE: tl.constexpr = OWN // STREAMED
    Q_STRIDE: tl.constexpr = HEADS * DIM
    KV_STRIDE: tl.constexpr = KV_HEADS * DIM

    head, tile = piece(GROUP, TILES)
    b, h = head // HEADS, head % HEADS
    g = h // (HEADS // KV_HEADS)
    start = (TILES - 1 - tile) * OWN  # the most expensive first
    q_ptr += (b * TOKENS * HEADS + h) * DIM
    dy_ptr += (b * TOKENS * HEADS + h) * DIM
    dq_ptr += (b * TOKENS * HEADS + h) * DIM
    k_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    v_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    rows, columns = start + tl.arange(0, OWN), tl.arange(0, STREAMED)

    logit = None  # what log2 of a weight of `exp` has of the row itself
    delta = None
    prefix = None
    if NORMALIZE:
        norm = tl.load(norm_ptr + head * TILES * OWN + rows)
        delta = tl.load(delta_ptr + head * TILES * OWN + rows)
    if DECAY:
        prefix_ptr += (b * KV_HEADS + g) * TILES * OWN
        suffix_ptr += (b * KV_HEADS + g) * TILES * OWN
        total_ptr += (b * KV_HEADS + g) * TILES
        prefix = tl.load(prefix_ptr + rows)
    if SCORE == "exp":
        if NORMALIZE and DECAY:
            logit = prefix - norm
        elif NORMALIZE:
            logit = -norm
        else:
            logit = prefix
    before = start // STREAMED
    whole = before
    if first_ptr is not None:
        first_ptr += b * TILES * OWN
        first = tl.load(first_ptr + rows)
        whole = tl.maximum(before - tl.cdiv(tl.load(first_ptr + start + OWN - 1), STREAMED), 0)
        before -= tl.load(first_ptr + start) // STREAMED

    query = load_tile(q_ptr, start, Q_STRIDE, OWN, DIM, TOKENS, False)
    dy = load_tile(dy_ptr, start, Q_STRIDE, OWN, DIM, TOKENS, False)
    acc = tl.zeros((OWN, DIM), tl.float32)
    sums = tl.zeros((OWN,), tl.float32)
    between = 0.0  # decay of the chunks between a key's and the rows'

    for i in range(0, whole):
        at = start - (i + 1) * STREAMED
        key = load_tile(k_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
        value = load_tile(v_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
        column = None
        if DECAY:
            column = tl.load(suffix_ptr + at + columns) + between
            between += tl.load(total_ptr + at // OWN, mask=(i + 1) % PER_TILE == 0, other=0.0)
        acc, sums = differentiate(
            acc,
            sums,
            query,
            dy,
            key,
            value,
            delta,
            logit,
            column,
            None,
            DECAY,
            SCORE,
            NORMALIZE,
            SCORE_SCALE,
            LOGIT_SCALE,
        )
    if first_ptr is not None:
        for i in range(whole, before):
            at = start - (i + 1) * STREAMED
            key = load_tile(k_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
            value = load_tile(v_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
            seen = (at + columns)[None, :] >= first[:, None]
            column = None
            if DECAY:
                column = tl.load(suffix_ptr + at + columns) + between
                between += tl.load(total_ptr + at // OWN, mask=(i + 1) % PER_TILE == 0, other=0.0)
            acc, sums = differentiate(
                acc,
                sums,
                query,
                dy,
                key,
                value,
                delta,
                logit,
                column,
                seen,
                DECAY,
                SCORE,
                NORMALIZE,
                SCORE_SCALE,
                LOGIT_SCALE,
            )

    # From here on weights count from the row itself, no longer from the start of its tile.
    if DECAY and SCORE != "exp":
        factor = tl.exp2(prefix)
        acc, sums = acc * factor[:, None], sums * factor
        logit = prefix

    for i in range(0, tl.minimum(PER_TILE, tl.cdiv(TOKENS - start, STREAMED))):
        at = start + i * STREAMED
        key = load_tile(k_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, False)
        value = load_tile(v_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, False)
        seen = (at + columns)[None, :] <= rows[:, None]
        if first_ptr is not None:
            seen &= (at + columns)[None, :] >= first[:, None]
        column = None
        if DECAY:
            column = -tl.load(prefix_ptr + at + columns)
        acc, sums = differentiate(
            acc,
            sums,
            query,
            dy,
            key,
            value,
            delta,
            logit,
            column,
            seen,
            DECAY,
            SCORE,
            NORMALIZE,
            SCORE_SCALE,
            LOGIT_SCALE,
        )

    if NORMALIZE and SCORE != "exp":
        inverse = tl.exp2(-norm)
        acc, sums = acc * inverse[:, None], sums * inverse
    if DECAY:
        tl.store(sums_ptr + head * TILES * OWN + rows, sums * OUTPUT_SCALE)
    store_tile(dq_ptr, acc * GRADIENT_SCALE, start, Q_STRIDE, OWN, DIM, TOKENS)


@triton.jit
def differentiate(
    acc,
    sums,
    query,
    dy,
    key,
    value,
    delta,
    row,
    column,
    seen,
    DECAY: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
):
    """(acc, sums) with a tile of keys: of the gradients of the rows, and of W.

    row, column: as in `weights.slope_of`; delta: <dy, y> of the rows or None; seen: which pairs count, None is all.
    """
    s = tl.dot(query, tl.trans(key))
    ds = tl.dot(dy, tl.trans(value))
    if delta is not None:
        ds -= delta[:, None]
    ds *= slope_of(s, row, column, seen, SCORE, NORMALIZE, SCORE_SCALE, LOGIT_SCALE)
    acc = tl.dot(ds.to(key.dtype), key, acc)
    if DECAY:
        sums += tl.sum(ds if SCORE == "exp" else ds * s, 1)
    return acc, sums
