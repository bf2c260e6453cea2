"""The forward kernel of quadratic attention: outputs, and the logarithms of the row sums if a gradient needs them."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.quadratic.operands import Decay, Problem
from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.quadratic.pieces import load_tile, piece, store_tile
from pallas_kernels.triton.quadratic.tiles import Tiles, programs_of
from pallas_kernels.triton.quadratic.weights import exponents, slope_of, weights_of


def forward(problem: Problem, tiles: Tiles, q, k, v, decay: Decay | None, first_visible, *, save_norm: bool):
    """y [B, T, H, V] and, if `save_norm`, log2 of the row sums [B, H, T padded to own] (+inf where the row is 0).

    A program takes a tile of `own` query rows past the keys that they see: first those before the tile, nearest first,
    whose decay is a factor per row times a factor per column; then those at its own positions ("beside"), whose decay
    is computed for each pair. A row's sum adds weights in float32; where few keys may be in sight (in masked tiles) it
    adds them as the product with the values sees them, rounded, so that a row with one key is its value.
    """

    @batched
    def run(q, k, v, decay, first_visible):
        batch, count = q.shape[0], problem.tiles(tiles.own)
        grid, group = programs_of(batch * problem.heads, count, 4 * problem.tokens * problem.head_dim)
        outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
        if save_norm:
            outputs.append(jax.ShapeDtypeStruct((batch, problem.heads, count * tiles.own), jnp.float32))
        return call(
            forward_kernel,
            *(q, k, v, *(decay or (None,) * 3), first_visible),
            out_type=tuple(outputs),
            grid=grid,
            name=f"{problem.score}_forward",
            GROUP=group,
            FLOOR=problem.floor,
            LATE=problem.late_scale(decay is not None),
            **tiles.constants(problem),
            **({} if save_norm else {"norm_ptr": None}),
        )

    return run(q, k, v, decay, first_visible)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    prefix_ptr,
    suffix_ptr,
    total_ptr,
    first_ptr,
    y_ptr,
    norm_ptr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    OUTPUT_SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    LATE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    OWN: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """See `forward`."""
    DECAY: tl.constexpr = prefix_ptr is not None
    RUNNING_MAX: tl.constexpr = SCORE == "exp" and NORMALIZE
    TILES: tl.constexpr = (TOKENS + OWN - 1) // OWN
    PER_TILE: tl.constexpr = OWN // STREAMED
    Q_STRIDE: tl.constexpr = HEADS * DIM
    KV_STRIDE: tl.constexpr = KV_HEADS * DIM

    head, tile = piece(GROUP, TILES)
    b, h = head // HEADS, head % HEADS
    g = h // (HEADS // KV_HEADS)
    start = (TILES - 1 - tile) * OWN  # the most expensive first
    q_ptr += (b * TOKENS * HEADS + h) * DIM
    y_ptr += (b * TOKENS * HEADS + h) * DIM
    k_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    v_ptr += (b * TOKENS * KV_HEADS + g) * DIM
    rows, columns = start + tl.arange(0, OWN), tl.arange(0, STREAMED)

    prefix = None
    if DECAY:
        prefix_ptr += (b * KV_HEADS + g) * TILES * OWN
        suffix_ptr += (b * KV_HEADS + g) * TILES * OWN
        total_ptr += (b * KV_HEADS + g) * TILES
        prefix = tl.load(prefix_ptr + rows)
    before = start // STREAMED
    whole = before
    if first_ptr is not None:
        first_ptr += b * TILES * OWN
        first = tl.load(first_ptr + rows)
        whole = tl.maximum(before - tl.cdiv(tl.load(first_ptr + start + OWN - 1), STREAMED), 0)
        before -= tl.load(first_ptr + start) // STREAMED

    query = load_tile(q_ptr, start, Q_STRIDE, OWN, DIM, TOKENS, False)
    acc = tl.zeros((OWN, DIM), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    largest = tl.full((OWN,), -1e30, tl.float32)  # below every logit, and finite: differences of it are no NaN
    between = 0.0  # decay of the chunks between a key's and the rows'

    for i in range(0, whole):
        at = start - (i + 1) * STREAMED
        key = load_tile(k_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
        column = None
        if DECAY:
            column = tl.load(suffix_ptr + at + columns) + between
            between += tl.load(total_ptr + at // OWN, mask=(i + 1) % PER_TILE == 0, other=0.0)
        rounded, acc, total, largest = weigh(
            acc, total, largest, query, key, None, column, None, SCORE, NORMALIZE, SCORE_SCALE, LOGIT_SCALE, LATE
        )
        value = load_tile(v_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
        acc = tl.dot(rounded, value, acc)
    if first_ptr is not None:
        for i in range(whole, before):
            at = start - (i + 1) * STREAMED
            key = load_tile(k_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
            seen = (at + columns)[None, :] >= first[:, None]
            column = None
            if DECAY:
                column = tl.load(suffix_ptr + at + columns) + between
                between += tl.load(total_ptr + at // OWN, mask=(i + 1) % PER_TILE == 0, other=0.0)
            rounded, acc, total, largest = weigh(
                acc, total, largest, query, key, None, column, seen, SCORE, NORMALIZE, SCORE_SCALE, LOGIT_SCALE, LATE
            )
            value = load_tile(v_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, True)
            acc = tl.dot(rounded, value, acc)

    # From here on weights count from the row itself, no longer from the start of its tile.
    if DECAY:
        if RUNNING_MAX:
            largest += prefix
        else:
            factor = tl.exp2(prefix)
            acc, total = acc * factor[:, None], total * factor

    for i in range(0, tl.minimum(PER_TILE, tl.cdiv(TOKENS - start, STREAMED))):
        at = start + i * STREAMED
        key = load_tile(k_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, False)
        seen = (at + columns)[None, :] <= rows[:, None]
        if first_ptr is not None:
            seen &= (at + columns)[None, :] >= first[:, None]
        column = None
        if DECAY:
            column = -tl.load(prefix_ptr + at + columns)
        rounded, acc, total, largest = weigh(
            acc, total, largest, query, key, prefix, column, seen, SCORE, NORMALIZE, SCORE_SCALE, LOGIT_SCALE, LATE
        )
        value = load_tile(v_ptr, at, KV_STRIDE, STREAMED, DIM, TOKENS, False)
        acc = tl.dot(rounded, value, acc)

    if NORMALIZE:
        dead = total < FLOOR
        total = tl.where(dead, 1.0, total)
        acc *= tl.where(dead, 0.0, 1.0 / total)[:, None]
        if norm_ptr is not None:
            norm = tl.log2(total)
            if RUNNING_MAX:
                norm += largest if LATE is None else largest * LATE
            tl.store(norm_ptr + head * TILES * OWN + rows, tl.where(dead, float("inf"), norm))
    else:
        acc *= OUTPUT_SCALE
    store_tile(y_ptr, acc, start, Q_STRIDE, OWN, DIM, TOKENS)


@triton.jit
def weigh(
    acc,
    total,
    largest,
    query,
    key,
    row,
    column,
    seen,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    LATE: tl.constexpr,
):
    """The weights of a tile of keys, rounded for the product with their values, and (acc, total, largest) beside them.

    acc: sums of weighted values; total: of weights; largest: of logits so far (exp, normalised), which weights are
    relative to; the differences are multiplied by LATE, if that is not None. row, column: log2 of the decays of rows
    and columns, or None; seen: which pairs count, None is all.
    """
    s = tl.dot(query, tl.trans(key))
    if SCORE == "exp" and NORMALIZE:
        logits = s if LATE is not None else exponents(s, row, column, LOGIT_SCALE)
        if seen is not None:
            logits = tl.where(seen, logits, -float("inf"))
        previous = largest
        largest = tl.maximum(previous, tl.max(logits, 1))
        less, logits = previous - largest, logits - largest[:, None]
        if LATE is not None:
            less, logits = less * LATE, logits * LATE
        shrink = tl.exp2(less)
        acc, total = acc * shrink[:, None], total * shrink
        weights = tl.exp2(logits)
    else:
        weights = weights_of(slope_of(s, row, column, seen, SCORE, NORMALIZE, SCORE_SCALE, LOGIT_SCALE), s, SCORE)
    rounded = weights.to(key.dtype)
    if NORMALIZE:
        total += tl.sum(weights if seen is None else rounded.to(tl.float32), 1)
    return rounded, acc, total, largest
