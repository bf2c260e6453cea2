"""The gradients of the keys and values, and the column sums that the gradient of the decays needs."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.quadratic.pieces import load_tile, piece, store_tile
from pallas_kernels.triton.quadratic.tiles import Tiles, programs_of
from pallas_kernels.triton.quadratic.weights import slope_of, weights_of

SMALLEST_TO_TILE_END = tl.constexpr(-96.0)


def backward_keys(problem: Problem, tiles: Tiles, q, k, v, dy, logit, delta, decay: Decay | None, last_visible):
    """dk [B, T, G, K], dv and, with a decay, sum_i W_ij [B, G, T padded to own]; W as in `quadratic.operands.slope_of`.

    Everything is transposed: a program takes a tile of `own` keys past the queries that see them, of all heads that
    share the keys: first those after the tile, nearest first, then those at its own positions ("beside").

    logit, delta: [B, H, T padded to own]. A logit is what the logarithm of a weight has of the query, its prefix less
    log2 of its row's sum; None where it has none. delta is <dy, y>, None where nothing is normalised.

    A key gets nothing from tiles after its own where its decay to the end of its own is below 2^-96. A weight, at most
    1, was at most 2^96 as it was there: any number of them can be added up.
    """

    @batched
    def run(q, k, v, dy, logit, delta, decay, last_visible):
        batch, count = q.shape[0], problem.tiles(tiles.own)
        streamed = 4 * problem.tokens * problem.head_dim * (problem.heads // problem.kv_heads)
        grid, group = programs_of(batch * problem.kv_heads, count, streamed)
        outputs = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)]
        if decay is not None:
            outputs.append(jax.ShapeDtypeStruct((batch, problem.kv_heads, count * tiles.own), jnp.float32))
        return call(
            keys_kernel,
            *(q, k, v, dy, logit, delta, *(decay or (None,) * 3), last_visible),
            out_type=tuple(outputs),
            grid=grid,
            name=f"{problem.score}_backward_keys",
            GROUP=group,
            GRADIENT_SCALE=problem.gradient_scale / problem.query_power,
            **tiles.constants(problem),
            **({"sums_ptr": None} if decay is None else {}),
        )

    return run(q, k, v, dy, logit, delta, decay, last_visible)


@triton.jit
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dy_ptr,
    logit_ptr,
    delta_ptr,
    prefix_ptr,
    suffix_ptr,
    total_ptr,
    last_ptr,
    dk_ptr,
    dv_ptr,
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
    """See `backward_keys`."""
    DECAY: tl.constexpr = prefix_ptr is not None
    REPEATS: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (TOKENS + OWN - 1) // OWN
    PER_TILE: tl.constexpr = OWN // STREAMED
    Q_STRIDE: tl.constexpr = HEADS * DIM
    KV_STRIDE: tl.constexpr = KV_HEADS * DIM

    head, tile = piece(GROUP, TILES)
    b, g = head // KV_HEADS, head % KV_HEADS
    start = tile * OWN
    after = start + OWN
    q_ptr += (b * TOKENS * HEADS + g * REPEATS) * DIM
    dy_ptr += (b * TOKENS * HEADS + g * REPEATS) * DIM
    k_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    v_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    dk_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    dv_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    rows, columns = start + tl.arange(0, OWN), tl.arange(0, STREAMED)

    if logit_ptr is not None:
        logit_ptr += head * REPEATS * TILES * OWN
    if delta_ptr is not None:
        delta_ptr += head * REPEATS * TILES * OWN
    row = None  # what log2 of a weight has of the key
    if DECAY:
        total_ptr += head * TILES
        suffix = tl.load(suffix_ptr + head * TILES * OWN + rows)
        if SCORE == "exp":
            row = suffix
    end = TOKENS
    if last_ptr is not None:
        last_ptr += b * TILES * OWN
        last = tl.load(last_ptr + rows)
        end = tl.load(last_ptr + after - 1) + 1
    count = tl.cdiv(tl.maximum(end - after, 0), STREAMED)

    key = load_tile(k_ptr, start, KV_STRIDE, OWN, DIM, TOKENS, False)
    value = load_tile(v_ptr, start, KV_STRIDE, OWN, DIM, TOKENS, False)
    dk = tl.zeros((OWN, DIM), tl.float32)
    dv = tl.zeros((OWN, DIM), tl.float32)
    sums = tl.zeros((OWN,), tl.float32)

    between = 0.0  # decay of the chunks between the keys' and a query's
    for step in range(0, REPEATS * count):  # one loop: accumulators that leave it in between take registers
        r, i = head_and_tile(step, count, REPEATS)
        at = after + i * STREAMED
        query = load_tile(q_ptr + r * DIM, at, Q_STRIDE, STREAMED, DIM, TOKENS, False)
        dy = load_tile(dy_ptr + r * DIM, at, Q_STRIDE, STREAMED, DIM, TOKENS, False)
        column = None
        delta = None
        seen = None
        if logit_ptr is not None:
            column = tl.load(logit_ptr + r * (TILES * OWN) + at + columns)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + r * (TILES * OWN) + at + columns)
        if DECAY:
            column += between
            between += tl.load(total_ptr + at // OWN, mask=(i + 1) % PER_TILE == 0, other=0.0)
            between = tl.where(i + 1 < count, between, 0.0)
        if last_ptr is not None:
            seen = (at + columns)[None, :] <= last[:, None]
        dk, dv, sums = differentiate(
            dk,
            dv,
            sums,
            key,
            value,
            query,
            dy,
            delta,
            row,
            column,
            seen,
            DECAY,
            SCORE,
            NORMALIZE,
            SCORE_SCALE,
            LOGIT_SCALE,
        )

    # From here on weights count from the key itself, no longer from the end of its tile.
    if DECAY:
        row = -tl.load(prefix_ptr + head * TILES * OWN + rows)
        if SCORE != "exp":
            factor = tl.exp2(suffix)
            there = suffix >= SMALLEST_TO_TILE_END  # else the sums may be infinite, or no number
            dk = tl.where(there[:, None], dk * factor[:, None], 0.0)
            dv = tl.where(there[:, None], dv * factor[:, None], 0.0)
            sums = tl.where(there, sums * factor, 0.0)

    count = tl.minimum(PER_TILE, tl.cdiv(TOKENS - start, STREAMED))
    for step in range(0, REPEATS * count):
        r, i = head_and_tile(step, count, REPEATS)
        at = start + i * STREAMED
        query = load_tile(q_ptr + r * DIM, at, Q_STRIDE, STREAMED, DIM, TOKENS, False)
        dy = load_tile(dy_ptr + r * DIM, at, Q_STRIDE, STREAMED, DIM, TOKENS, False)
        column = None
        delta = None
        if logit_ptr is not None:
            column = tl.load(logit_ptr + r * (TILES * OWN) + at + columns)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + r * (TILES * OWN) + at + columns)
        seen = (at + columns)[None, :] >= rows[:, None]
        if last_ptr is not None:
            seen &= (at + columns)[None, :] <= last[:, None]
        dk, dv, sums = differentiate(
            dk,
            dv,
            sums,
            key,
            value,
            query,
            dy,
            delta,
            row,
            column,
            seen,
            DECAY,
            SCORE,
            NORMALIZE,
            SCORE_SCALE,
            LOGIT_SCALE,
        )

    if DECAY:
        tl.store(sums_ptr + head * TILES * OWN + rows, sums * OUTPUT_SCALE)
    store_tile(dk_ptr, dk * GRADIENT_SCALE, start, KV_STRIDE, OWN, DIM, TOKENS)
    store_tile(dv_ptr, dv * OUTPUT_SCALE, start, KV_STRIDE, OWN, DIM, TOKENS)


@triton.jit
def head_and_tile(step, count, REPEATS: tl.constexpr):
    """The number of the query head and of its tile, each of `count`, at a step of a loop over both."""
    if REPEATS == 1:
        r, i = 0, step
    else:
        count = tl.maximum(count, 1)  # there is no step where it is 0, but it is divided by in advance
        r, i = step // count, step % count
    return r, i


@triton.jit
def differentiate(
    dk,
    dv,
    sums,
    key,
    value,
    query,
    dy,
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
    """(dk, dv, sums) with a tile of queries: of the gradients of the keys and values, and of W.

    row, column: as in `weights.slope_of`; delta: <dy, y> of the columns or None; seen: which pairs count, None is all.
    """
    s = tl.dot(key, tl.trans(query))
    ds = tl.dot(value, tl.trans(dy))
    if delta is not None:
        ds -= delta[None, :]
    slope = slope_of(s, row, column, seen, SCORE, NORMALIZE, SCORE_SCALE, LOGIT_SCALE)
    ds *= slope
    dv = tl.dot(weights_of(slope, s, SCORE).to(dy.dtype), dy, dv)
    dk = tl.dot(ds.to(query.dtype), query, dk)
    if DECAY:
        sums += tl.sum(ds if SCORE == "exp" else ds * s, 1)
    return dk, dv, sums
