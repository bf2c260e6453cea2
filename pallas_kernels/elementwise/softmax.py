"""What a cross entropy and its gradient take of each row of logits, in one pass over them."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import in_32_bits
from pallas_kernels.elementwise.vectors import layout, load, programs_at_once, zeros
from pallas_kernels.schedule import each_piece

PIECE = 512  # logits at a time: 4 a thread, 16 bytes
PIECES = 8  # in a block, all of them in flight: 64 KiB on a multiprocessor


def unsupported(logits: jax.Array) -> str | None:
    """Why there is no kernel for logits [..., V], or None."""
    vocabulary = logits.shape[-1]
    if logits.dtype != jnp.float32:
        return f"it is for float32, not {logits.dtype}"
    if vocabulary < PIECE or vocabulary % 4:
        return f"it needs a vocabulary that is a multiple of 4, {PIECE} or more, not {vocabulary}"
    return None


@in_32_bits
@jax.jit
def softmax_rows(logits, targets):
    """Of each row l: the largest, sum exp(l - largest), the place of the first largest, and l_target.

    A program takes every n-th row, block by block; a row's last block ends with the row, and what the block before had
    of it is -inf. Every thread has the largest of some places, m, and s = sum exp(l - m) over them. A logit joins them
    by one exponential, of the smaller less the larger of m and l: s e + 1 or s + e. The threads' m and s meet at the
    row's end.

    Args:
      logits: [N, V] float32. A row with NaN or inf has the sum NaN; one of nothing but -inf has float32's lowest number
        for its largest, and the sum 0.
      targets: [N] int32. The logit of one outside of the vocabulary is 0.

    Returns:
      Arrays [N]: float32, float32, int32, float32. V is the place of NaN.
    """
    rows, vocabulary = logits.shape
    programs, parts = min(programs_at_once(), rows), min(PIECES, vocabulary // PIECE)
    size = parts * PIECE
    blocks = -(-vocabulary // size)
    lowest = jnp.finfo(jnp.float32).min  # not -inf, of which two have no difference

    def body(logits_ref, targets_ref, largest_ref, total_ref, first_ref, of_target_ref):
        program = lax.axis_index("program")
        inside = plgpu.broadcasted_iota(jnp.int32, (PIECE,), 0, layout=layout(pl.ds(0, PIECE)))

        def start(block, n):
            return lax.min(block * size, vocabulary - size) + n * PIECE

        def load_piece(t, block, n):
            return load(logits_ref, (t,), pl.ds(start(block, n), PIECE))

        def row(i, carry):
            t = program + i * programs
            following = lax.min(t + programs, rows - 1)  # beyond the last, of which nothing is stored
            target, loaded = carry
            next_target = targets_ref[following]
            of_target = logits_ref[t, lax.clamp(0, target, vocabulary - 1)]

            def block(j, carry):
                loaded, largest, total, place = carry
                ends = j + 1 == blocks
                upcoming = jnp.where(ends, following, t), jnp.where(ends, 0, j + 1)
                for n in range(parts):
                    x = jnp.where(inside < j * size - start(j, n), -jnp.inf, loaded[n])
                    # Into the registers that this piece leaves: moves would wait for what is in flight.
                    loaded = [*loaded[:n], load_piece(*upcoming, n), *loaded[n + 1 :]]
                    larger = jnp.maximum(largest, x)
                    e = jnp.exp(jnp.minimum(largest, x) - larger)
                    place = jnp.where(x > largest, start(j, n), place)
                    total = jnp.where(x > largest, total * e + 1, total + e)
                    largest = larger
                return loaded, largest, total, place

            zero = zeros(pl.ds(0, PIECE))
            carry = loaded, zero + lowest, zero, zero.astype(jnp.int32)
            loaded, largest, total, place = lax.fori_loop(0, blocks, block, carry)
            of_row = jnp.max(largest)
            largest_ref[t] = of_row
            total_ref[t] = jnp.sum(total * jnp.exp(largest - of_row))
            first_ref[t] = jnp.min(jnp.where(largest == of_row, place + inside, vocabulary))
            of_target_ref[t] = jnp.where((target >= 0) & (target < vocabulary), of_target, 0.0)
            return next_target, loaded

        first_block = [load_piece(program, 0, n) for n in range(parts)]
        each_piece(rows, programs, program, row, (targets_ref[program], first_block))

    numbers, places = jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    kernel = plgpu.kernel(
        body,
        out_type=(numbers, numbers, places, numbers),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="softmax_rows",
    )
    return kernel(logits, targets)
