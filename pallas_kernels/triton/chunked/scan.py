"""The states before each chunk, from what each chunk adds."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.triton.call import batched, call
from pallas_kernels.triton.chunked.tiles import tiles_of


@triton.jit
def scan_kernel(
    added_ptr,
    weight_ptr,
    initial_ptr,
    other_ptr,
    counts_ptr,
    inner_ptr,
    before_ptr,
    final_ptr,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    REVERSE: tl.constexpr,
    PARTS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A program carries BLOCK entries of the state of one batch entry and group past all chunks.

    COUNTED: entries that have one of the counts.
    """
    blocks: tl.constexpr = SIZE // BLOCK
    program = tl.program_id(0).to(tl.int64)
    of_state, entries = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    weight_ptr += of_state * CHUNKS
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + of_state * SIZE + entries)
    for i in tl.range(0, CHUNKS, num_stages=AHEAD):
        c = CHUNKS - 1 - i if REVERSE else i
        at = (of_state * CHUNKS + c) * SIZE + entries
        upcoming = tl.load(added_ptr + at)
        weight = tl.load(weight_ptr + c)
        rounded = state.to(before_ptr.dtype.element_ty)
        if PARTS == 1:
            tl.store(before_ptr + at, rounded)
        else:
            at_part = (of_state * CHUNKS + c) * 2 * SIZE + entries
            tl.store(before_ptr + at_part, rounded)
            rest = (state - rounded.to(tl.float32)).to(before_ptr.dtype.element_ty)
            tl.store(before_ptr + at_part + SIZE, rest)
        if other_ptr is not None:
            products = state * tl.load(other_ptr + at).to(tl.float32)
            if counts_ptr is not None:
                products *= tl.load(counts_ptr + entries // COUNTED)
            tl.store(inner_ptr + (of_state * CHUNKS + c) * blocks + program % blocks, tl.sum(products))
        state = state * weight + upcoming
    tl.store(final_ptr + of_state * SIZE + entries, state)


@functools.partial(jax.jit, static_argnames=("reverse", "dtype", "parts"))
def scan(added, weight, initial, *, reverse: bool = False, dtype=jnp.bfloat16, parts: int = 1, other=None, counts=None):
    """S_c = weight_c S_{c-1} + added_c over N chunks; backwards from the last chunk if `reverse`.

    Args:
      added: [B, G, N, ...] float32.
      weight: [B, G, N] float32.
      initial: [B, G, ...] float32, the state before the first step; None is 0.
      reverse: whether the last chunk is the first step.
      dtype: of the states before each step.
      parts: 2: these states are the sums of two such numbers each.
      other: other states before each step [B, G, N, ...], to be multiplied with.
      counts: float32, how often the entries count in these products, of as many at a time as divide them evenly.

    Returns:
      The state before each step [B, G, N, ...], or [B, G, N, 2, ...] in parts, and the state after the last [B, G, ...]
      float32; with `other` also the inner products of the two states before each step [B, G, N, blocks] float32, to be
      summed.
    """
    tiles = tiles_of("scan")

    @batched
    def run(added, weight, initial, other, counts):
        counts = None if counts is None else counts[0]  # the same of every row
        batch, groups, chunks, *shape = added.shape
        size = math.prod(shape)
        block = math.gcd(size, tiles.block)
        before = (batch, groups, chunks, *((parts,) if parts > 1 else ()), *shape)
        outputs = [jax.ShapeDtypeStruct(before, dtype), jax.ShapeDtypeStruct((batch, groups, *shape), jnp.float32)]
        absent = (None,)  # inner_ptr
        if other is not None:
            outputs.insert(0, jax.ShapeDtypeStruct((batch, groups, chunks, size // block), jnp.float32))
            absent = ()
        results = call(
            scan_kernel,
            *(added, weight, initial, other, counts, *absent),
            out_type=tuple(outputs),
            grid=(batch * groups * (size // block),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="scan_backward" if reverse else "scan",
            SIZE=size,
            CHUNKS=chunks,
            REVERSE=reverse,
            PARTS=parts,
            COUNTED=1 if counts is None else size // counts.size,
            BLOCK=block,
            AHEAD=tiles.num_stages,
        )
        return (*results[-2:], *results[:-2])

    return run(added, weight, initial, other, None if counts is None else counts[None])
