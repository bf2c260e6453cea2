"""Which rows a program of the kernels that read states takes."""

import triton
import triton.language as tl

from pallas_kernels.chunked.problem import Problem


def sizes(problem: Problem) -> dict[str, int]:
    """The sizes of a call, as the kernels' constexprs."""
    p = problem
    return {"TOKENS": p.tokens, "HEADS": p.heads, "GROUPS": p.groups, "CHUNK": p.chunk}


@triton.jit
def place(
    program, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):
    """Batch entry, group, chunk, head and first token of a program's rows, int64.

    Programs of one state follow each other, so that the cache holds it.
    """
    tiles: tl.constexpr = CHUNK // ROWS
    repeats: tl.constexpr = HEADS // GROUPS
    chunks: tl.constexpr = TOKENS // CHUNK
    program = program.to(tl.int64)
    tile, at = program % tiles, program // tiles
    r, at = at % repeats, at // repeats
    c, at = at % chunks, at // chunks
    g, b = at % GROUPS, at // GROUPS
    return b, g, c, g * repeats + r, c * CHUNK + tile * ROWS
