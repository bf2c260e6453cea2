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
    before_ptr,
    final_ptr,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """A program carries BLOCK entries of the state of one batch entry and group past all chunks."""
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
        tl.store(before_ptr + at, state.to(before_ptr.dtype.element_ty))
        state = state * weight + upcoming
    tl.store(final_ptr + of_state * SIZE + entries, state)


@functools.partial(jax.jit, static_argnames=("reverse", "dtype"))
def scan(added, weight, initial, *, reverse: bool = False, dtype=jnp.bfloat16):
    """S_c = weight_c S_{c-1} + added_c over N chunks; backwards from the last chunk if `reverse`.

    Args:
      added: [B, G, N, ...] float32.
      weight: [B, G, N] float32.
      initial: [B, G, ...] float32, the state before the first step; None is 0.
      reverse: whether the last chunk is the first step.
      dtype: of the states before each step.

    Returns:
      The state before each step [B, G, N, ...], and the state after the last [B, G, ...] float32.
    """
    tiles = tiles_of("scan")

    @batched
    def run(added, weight, initial):
        batch, groups, chunks, *shape = added.shape
        size = math.prod(shape)
        block = math.gcd(size, tiles.block)
        return call(
            scan_kernel,
            added,
            weight,
            initial,
            out_type=(
                jax.ShapeDtypeStruct(added.shape, dtype),
                jax.ShapeDtypeStruct((batch, groups, *shape), jnp.float32),
            ),
            grid=(batch * groups * (size // block),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name="scan_backward" if reverse else "scan",
            SIZE=size,
            CHUNKS=chunks,
            REVERSE=reverse,
            BLOCK=block,
            AHEAD=tiles.num_stages,
        )

    return run(added, weight, initial)
