"""Which program has which tile, and how tiles are loaded and stored."""

import triton
import triton.language as tl


@triton.jit
def piece(GROUP: tl.constexpr, TILES: tl.constexpr):
    """(head among those of all batch entries, int64; tile) of this program: the order of `schedule.Schedule`.

    GROUP heads are taken at a time, so that what they read stays in the cache, and of those tile by tile.
    """
    program = tl.program_id(0)
    in_group = program % (GROUP * TILES)
    head = program // (GROUP * TILES) * GROUP + in_group % GROUP
    return head.to(tl.int64), in_group // GROUP


@triton.jit
def addresses(pointer, at, STRIDE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Of the rows from `at` on of a head, [ROWS, DIM]; STRIDE elements from one row to the next."""
    tile = tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, DIM)[None, :]
    return pointer + at.to(tl.int64) * STRIDE + tile


@triton.jit
def load_tile(
    pointer, at, STRIDE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, INSIDE: tl.constexpr
):
    """The rows from `at` on of a head, [ROWS, DIM]; zeros beyond TOKENS, which none is if INSIDE."""
    source = addresses(pointer, at, STRIDE, ROWS, DIM)
    if INSIDE or TOKENS % ROWS == 0:
        return tl.load(source)
    return tl.load(source, mask=(at + tl.arange(0, ROWS) < TOKENS)[:, None], other=0.0)


@triton.jit
def store_tile(pointer, value, at, STRIDE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr):
    """Stores [ROWS, DIM] as the rows from `at` on of a head, those before TOKENS."""
    target = addresses(pointer, at, STRIDE, ROWS, DIM)
    tl.store(target, value.to(pointer.dtype.element_ty), mask=(at + tl.arange(0, ROWS) < TOKENS)[:, None])
