"""What decoding folds into its states: S' = g S + sum_t w_t phi(k_t) v_t^T, in place, in a single pass over S.

The states of all layers lie in one stack, of which only the rows of the batch that are due are read and written. They
are far larger than everything else that this touches, so it is a question of bandwidth: tiles of S, whatever states
they belong to, are dealt out to the programs in equal parts and go through buffers in shared memory.
"""

import math
from typing import Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, ROW, TILE, columns, rows
from pallas_kernels.decoding.contract import DEGREE, SIZE, merged, plan, unsupported_fold
from pallas_kernels.device import in_32_bits, multiprocessors

HEIGHT = 64  # rows of a tile in registers: the features of one cyclic offset
WIDTH = SIZE  # values, and numbers of a key
LONGEST = 128  # tokens, whose keys and values lie in shared memory
BUFFERS = 3  # tiles in shared memory: one in registers, two on their way
SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor, of which a program takes 1 KiB more than it asks for
AT_ONCE = 8  # tokens whose keys and values are on their way together


def unsupported(kv, keys, values, size: int) -> str | None:
    """Why the kernel cannot fold `size` tokens, of rings [..., K] and [..., V], into states [..., D, V], or None."""
    if reason := unsupported_fold(kv, keys, values):
        return reason
    if size > LONGEST:
        return f"it has shared memory for {LONGEST} tokens at a time, and these are {size}"
    return None


@in_32_bits
def fold(score: Literal["linear", "squared"], state, previous, keys, values, start, log_weights, log_carry, due):
    """exp(log_carry) S + sum_t exp(log_weights_t) phi(k_t) v_t^T in the rows that are due; key_sum without the v_t.

    Products and sums are in float32. What a row becomes depends on nothing of another. States that are donated, or
    carried by a loop, are changed where they lie.

    Args:
      score: whose features phi are, in the order of `twomamba_jax.ops.score`: D is 64 or 2080.
      state: the pair of kv [L, B, G, D, 64], float32 or bfloat16, and key_sum [L, B, G, D] float32.
      previous: such a pair, which takes the state as it was in the rows that are due; or None.
      keys: [L, B, G, N, 64] float32 or bfloat16.
      values: [L, B, G, N, 64] float32 or bfloat16.
      start: which of the N a row's first token is, int32 [B].
      log_weights: of the r <= 128 tokens from there on, [L, B, G, r] float32.
      log_carry: [L, B, G] float32.
      due: bool [B].

    Returns:
      (state, previous), in the structure that they came in.
    """
    arrays, structure = jax.tree.flatten((state, previous))
    layers, batch, groups, features, _ = arrays[0].shape
    size, per_row = log_weights.shape[-1], layers * groups
    height = min(features, 2 * HEIGHT)
    whole = features // height  # tiles, but for the last where it is cut off
    tiles = -(-features // height)
    degree = DEGREE[score]
    dtype = arrays[0].dtype
    of_program = BUFFERS * height * (WIDTH * dtype.itemsize + 4) + 3 * WIDTH * 4 * size + 1200
    programs = min(multiprocessors() * (SHARED_MEMORY // of_program), layers * batch * groups * tiles)

    def body(plan_ref, key_ref, value_ref, root_ref, carry_ref, *refs):
        (*state_refs, kv_s, sum_s, key_s, value_s, arrived) = refs
        now, before = state_refs[:2], state_refs[2:]
        program = lax.axis_index("program")
        total = plan_ref[0] * per_row * tiles
        share = (total + programs - 1) // programs
        first = program * share
        last = lax.min(first + share, total)

        def place(step):
            """The row, its state among all, and the tile of that state."""
            item, tile = step // tiles, lax.rem(step, tiles)
            row = plan_ref[1 + item // per_row]
            layer, group = lax.rem(item, per_row) // groups, lax.rem(item, groups)
            return row, (layer * batch + row) * groups + group, tile

        def copy(pair, index, tile, slot, one):
            """One copy of a tile of kv, and one of its part of key_sum.

            What is past a state's end is neither read nor written: copies of tiled buffers see to that. Of a vector
            they cut off only what is past the end of all.
            """
            kv_ref, sum_ref = pair
            one(kv_ref.at[index, pl.ds(tile * height, height), :], kv_s.at[slot], arrived.at[slot])
            for count, there in ((height, tile < whole), (features % height, tile == whole)):
                if count:

                    @pl.when(there)
                    def _(count=count):
                        at = sum_ref.at[index, pl.ds(tile * height, count)]
                        one(at, sum_s.at[slot, pl.ds(0, count)], arrived.at[slot])

        def load(step):
            _, index, tile = place(step)
            copy(now, index, tile, lax.rem(step, BUFFERS), plgpu.copy_gmem_to_smem)

        def store(to, index, tile, slot):
            copy(to, index, tile, slot, lambda there, here, _: plgpu.copy_smem_to_gmem(here, there))

        def stage(row, index):
            """Keys times the root of their weight, twice in a row, and values."""

            def block(at, count):
                at_ring = plan_ref[1 + batch + row] + at
                loaded = []
                for t in range(count):
                    pair = (ref.at[index, at_ring + t] for ref in (key_ref, value_ref))
                    key, value = (plgpu.load(x, layout=ROW, optimized=False).astype(jnp.float32) for x in pair)
                    loaded.append((key * root_ref[index, at + t], value))
                for t, (key, value) in enumerate(loaded):
                    key_s[at + t, pl.ds(0, WIDTH)] = key
                    key_s[at + t, pl.ds(WIDTH, WIDTH)] = key
                    value_s[at + t] = value

            blocks = size // AT_ONCE
            lax.fori_loop(0, blocks, lambda i, _: block(i * AT_ONCE, AT_ONCE), None)
            if size % AT_ONCE:
                block(blocks * AT_ONCE, size % AT_ONCE)
            plgpu.commit_smem()

        def advance(index, tile, slot):
            """The tile in a buffer, and its part of key_sum, after the tokens."""
            halves = range(height // HEIGHT)
            offsets = [tile * len(halves) + half for half in halves]
            scales = [jnp.where(offset == 0, 1.0, math.sqrt(2)).astype(jnp.float32) for offset in offsets]
            carry = carry_ref[index]

            def half_of(half):
                return slot, pl.ds(half * HEIGHT, HEIGHT)

            kv = tuple(plgpu.load(kv_s.at[*half_of(n)], layout=TILE) for n in halves)
            key_sum = tuple(plgpu.load(sum_s.at[*half_of(n)], layout=ROW, optimized=False) for n in halves)
            kv = tuple(x.astype(jnp.float32) * carry for x in kv)
            key_sum = tuple(x * carry for x in key_sum)

            def token(t, sums):
                key = plgpu.load(key_s.at[t, pl.ds(0, WIDTH)], layout=ROW, optimized=False)
                value = columns(plgpu.load(value_s.at[t], layout=COLUMN, optimized=False), (HEIGHT, WIDTH))
                kv, key_sum = [], []
                for n in halves:
                    phi = key
                    if degree == 2:
                        rotated = key_s.at[t, pl.ds(offsets[n], WIDTH)]
                        phi = key * scales[n] * plgpu.load(rotated, layout=ROW, optimized=False)
                    kv.append(sums[0][n] + rows(phi, (HEIGHT, WIDTH)) * value)
                    key_sum.append(sums[1][n] + phi)
                return tuple(kv), tuple(key_sum)

            kv, key_sum = lax.fori_loop(0, size, token, (kv, key_sum))
            if before:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n in halves:
                kv_s[half_of(n)] = kv[n].astype(dtype)
                sum_s[half_of(n)] = key_sum[n]
            plgpu.commit_smem()

        def turn(step, _):
            row, index, tile = place(step)
            slot = lax.rem(step, BUFFERS)

            @pl.when((step == first) | (tile == 0))
            def _():
                stage(row, index)

            plgpu.barrier_wait(arrived.at[slot])
            if before:
                store(before, index, tile, slot)
            advance(index, tile, slot)
            store(now, index, tile, slot)
            # The tile before this one has left the buffer that the next but one comes to.
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)

            @pl.when(step + BUFFERS - 1 < last)
            def _():
                load(step + BUFFERS - 1)

        for ahead in range(BUFFERS - 1):

            @pl.when(first + ahead < last)
            def _(ahead=ahead):
                load(first + ahead)

        lax.fori_loop(first, last, turn, None)
        plgpu.wait_smem_to_gmem(0)

    tiling = (plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))
    kernel = plgpu.kernel(
        body,
        out_type=(),
        scratch_types=(
            plgpu.SMEM((BUFFERS, height, WIDTH), dtype, transforms=tiling),
            plgpu.SMEM((BUFFERS, height), jnp.float32),
            plgpu.SMEM((size, 2 * WIDTH), jnp.float32),
            plgpu.SMEM((size, WIDTH), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        ),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="fold",
    )

    # XLA would merge the kernel with slices that it takes, or that its results become, whatever arrays they belong to;
    # and nothing would say then that it works in place. Barriers keep them apart.
    arrays, keys, values = lax.optimization_barrier((arrays, keys, values))
    refs = [jax.new_ref(merged(x)) for x in arrays]
    root = jnp.exp(log_weights / degree)
    kernel(
        plan(due, start),
        merged(keys),
        merged(values),
        merged(root),
        merged(jnp.exp(log_carry)),
        *refs,
    )
    after = lax.optimization_barrier([jax.freeze(ref) for ref in refs])
    return structure.unflatten(new.reshape(old.shape) for new, old in zip(after, arrays))
