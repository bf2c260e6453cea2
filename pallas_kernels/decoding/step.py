"""One token's attention in a step of decoding: to the state, to the ring of tokens that are not in it, and to itself.

    numerator    w phi(s q)^T S + sum_j w_j score(<s q, k_j>) v_j
    denominator  w phi(s q)^T z + sum_j w_j score(<s q, k_j>)

with w_j the decay of token j: exp of the sum of the log decays of all tokens after it, and w likewise for the state.

The state is far larger than everything else that a step touches, so this is a question of bandwidth: one pass over S,
tile by tile through shared memory, always with the next ones on their way. Features are formed from q where they are
used: tile n of the squared ones is sqrt(2) q times q rotated by n (`ops.score`), and what the state ends with is the
second half of tile 32, which repeats the first. The ring is read as it lies, slot by slot, with the new token in its
own; a slot whose token is in the state, or not there yet, adds exactly 0, whatever it holds.

Caches lie in one stack for all layers of a model, from which the kernel reads the layer it is told: a slice of the
stack as its operand would be a copy.
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, ROW, TILE, columns, rows
from pallas_kernels.decoding.contract import SIZE, DecodeStep, padded, unsupported_step
from pallas_kernels.device import in_32_bits, multiprocessors

TILE_SHAPE = (SIZE, SIZE)  # features of the state, or slots of the ring, by values
PROGRAMS = 8  # that share the work, at least, for each multiprocessor
STAGES = 3  # tiles of the state in flight for each program


unsupported = unsupported_step


@in_32_bits
def decode_step(spec: DecodeStep, layer, kv, key_sum, keys, values, folded, length, q, k, v, log_decay):
    """P parts of the numerators and denominators of one token per row, to be added up.

    Args:
      spec: what to compute.
      layer: which of the L, int32 [].
      kv: S [L, B, G, D, 64], float32 or bfloat16.
      key_sum: z [L, B, G, D] float32.
      keys: the rings' [L, B, G, N, 64]; token t lies in slot t mod N.
      values: [L, B, G, N, 64].
      folded: the first token that is not in the state, int32 [L, B].
      length: the new token, int32 [L, B]; `folded` to it are fewer than N.
      q: [B, G, R, 64], R <= 4.
      k: the new token's key [B, G, 64], in the dtype of `keys`.
      v: its value [B, G, 64], in the dtype of `values`.
      log_decay: of the tokens from `folded` to the new one, each in its slot, 0 elsewhere, [B, G, padded(N)] float32.

    Returns:
      [P, B, G, R, 3, 64] float32: numerators, and denominators through the state and of the ring, 64 times each so that
      what is left is elementwise; without normalisation numerators only, [P, B, G, R, 1, 64].
    """
    _, batch, groups, features, _ = kv.shape
    slots, repeats = keys.shape[3], q.shape[2]
    count, ring_count, box = -(-features // SIZE), padded(slots) // SIZE, min(slots, SIZE)
    splits = max(1, min(count // 2, -(-PROGRAMS * multiprocessors() // (batch * groups))))
    per_split = -(-count // splits)
    splits = -(-count // per_split)

    def body(
        layer_ref, kv_ref, z_ref, keys_ref, values_ref, folded_ref, length_ref, q_ref, k_ref, v_ref, decay_ref, *refs
    ):
        y_ref, kv_s, z_s, keys_s, values_s, q_s, full, ring_full = refs
        b, g, split = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("split")
        layer = layer_ref[0]
        first, end = split * per_split, lax.min((split + 1) * per_split, count)
        ring_end = lax.select(split == splits - 1, ring_count, 0)  # the last program has the ring

        def copy_state(n):
            """Sends for tile n of the state; the last one ends with it."""
            stage, at = lax.rem(n - first, STAGES), pl.ds(lax.min(n * SIZE, features - SIZE), SIZE)
            plgpu.copy_gmem_to_smem(kv_ref.at[layer, b, g, at], kv_s.at[stage], full.at[stage])
            if spec.normalize:
                plgpu.copy_gmem_to_smem(z_ref.at[layer, b, g, at], z_s.at[stage], full.at[stage])

        def copy_ring(t):
            """Sends for tile t of the ring; what it has beyond the ring's end has no weight."""
            for ref, buffer in ((keys_ref, keys_s), (values_ref, values_s)):
                tile = ref.at[layer, b, g, pl.ds(t * SIZE, box)]
                plgpu.copy_gmem_to_smem(tile, buffer.at[pl.ds(0, box)], ring_full)

        def vector(x):
            return plgpu.layout_cast(jnp.full((SIZE,), x, jnp.float32), ROW)

        def load_row(ref):
            return plgpu.load(ref, layout=ROW, optimized=False)

        def load_decays(t, layout):
            return plgpu.load(decay_ref.at[b, g, pl.ds(t * SIZE, SIZE)], layout=layout, optimized=False)

        def age(t, layout):
            """How many tokens before the new one the token of a slot is: 0 for the new one, N beyond the ring."""
            slot = plgpu.broadcasted_iota(jnp.int32, (SIZE,), 0, layout=layout) + t * SIZE
            return jnp.where(slot < slots, newest - slot + jnp.where(slot > newest, slots, 0), slots)

        def weights_of(t):
            """The weights of a tile of the ring, 0 for slots without a token that waits."""
            own = age(t, ROW)

            def add(u, total):
                later = columns(age(u, COLUMN), TILE_SHAPE) < rows(own, TILE_SHAPE)
                return total + jnp.where(later, columns(load_decays(u, COLUMN), TILE_SHAPE), 0.0).sum(1)

            total = lax.fori_loop(0, ring_count, add, vector(0.0))
            return jnp.where(own <= waiting, jnp.exp(total), 0.0)

        for i in range(min(STAGES, per_split)):
            pl.when(first + i < end)(lambda i=i: copy_state(first + i))
        pl.when(ring_end > 0)(lambda: copy_ring(0))

        # Small, and on their way at the same time as the first tiles.
        key, value = (load_row(ref.at[b, g]) for ref in (k_ref, v_ref))
        queries = [load_row(q_ref.at[b, g, r]).astype(jnp.float32) * spec.scale for r in range(repeats)]
        waiting = length_ref[layer, b] - folded_ref[layer, b]
        newest = lax.rem(length_ref[layer, b], slots)  # slot
        state_weight = jnp.exp(sum(load_decays(t, ROW) for t in range(ring_count)).sum())
        for r, query in enumerate(queries):
            q_s[r, pl.ds(0, SIZE)] = query
            q_s[r, pl.ds(SIZE, SIZE)] = query
        plgpu.commit_smem()

        def rotated(r, n, layout=ROW):
            """Query r, rotated by n."""
            return plgpu.load(q_s.at[r, pl.ds(n, SIZE)], layout=layout, optimized=False)

        def features_of(n):
            """Tile n of the features of each query, 0 where the tile overlaps the one before it."""
            if spec.score == "linear":
                return queries
            row = plgpu.broadcasted_iota(jnp.int32, (SIZE,), 0, layout=ROW)
            weight = lax.select(n == 0, 1.0, math.sqrt(2))
            weight = jnp.where(row >= n * SIZE - (features - SIZE), weight, 0.0)
            return [query * weight * rotated(r, n) for r, query in enumerate(queries)]

        def step(n, carry):
            sums, denominators = carry
            stage = lax.rem(n - first, STAGES)
            plgpu.barrier_wait(full.at[stage])
            tile = plgpu.load(kv_s.at[stage], layout=TILE, optimized=False).astype(jnp.float32)
            phi = features_of(n)
            if spec.normalize:
                z = load_row(z_s.at[stage])
                denominators = [total + z * x for total, x in zip(denominators, phi, strict=True)]
            plgpu.commit_smem()  # everyone has read it
            pl.when(n + STAGES < end)(lambda: copy_state(n + STAGES))
            return [acc + tile * rows(x, TILE_SHAPE) for acc, x in zip(sums, phi, strict=True)], denominators

        zero = plgpu.layout_cast(jnp.zeros(TILE_SHAPE, jnp.float32), TILE)
        zeros = [vector(0.0)] * (repeats if spec.normalize else 0)
        sums, through_state = lax.fori_loop(first, end, step, ([zero] * repeats, zeros))

        def ring_step(t, carry):
            sums, denominators = carry
            weights, at = weights_of(t), newest - t * SIZE
            plgpu.barrier_wait(ring_full)

            @pl.when((at >= 0) & (at < SIZE))
            def _():
                keys_s[at], values_s[at] = key, value

            plgpu.commit_smem()
            tile = plgpu.load(keys_s, layout=TILE, optimized=False).astype(jnp.float32)
            scores = [(tile * columns(rotated(r, 0, COLUMN), TILE_SHAPE)).sum(1) for r in range(repeats)]
            if spec.score == "squared":
                scores = [x * x for x in scores]
            scores = [jnp.where(weights > 0, x * weights, 0.0) for x in scores]
            tile = plgpu.load(values_s, layout=TILE, optimized=False).astype(jnp.float32)
            tile = jnp.where(rows(weights, TILE_SHAPE) > 0, tile, 0.0)
            if ring_count > 1:
                plgpu.commit_smem()
                pl.when(t + 1 < ring_count)(lambda: copy_ring(t + 1))
            sums = [acc + tile * rows(x, TILE_SHAPE) for acc, x in zip(sums, scores, strict=True)]
            if spec.normalize:
                denominators = [total + x for total, x in zip(denominators, scores, strict=True)]
            return sums, denominators

        sums = [acc * state_weight for acc in sums]
        sums, of_ring = lax.fori_loop(0, ring_end, ring_step, (sums, zeros))
        for r, acc in enumerate(sums):
            y_ref[split, b, g, r, 0] = acc.sum(0)
            if spec.normalize:
                y_ref[split, b, g, r, 1] = vector(through_state[r].sum() * state_weight)
                y_ref[split, b, g, r, 2] = vector(of_ring[r].sum())

    swizzle = 128
    transforms = plgpu.TilingTransform((8, swizzle // kv.dtype.itemsize)), plgpu.SwizzleTransform(swizzle)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((splits, batch, groups, repeats, 3 if spec.normalize else 1, SIZE), jnp.float32),
        scratch_types=[
            plgpu.SMEM((STAGES, *TILE_SHAPE), kv.dtype, transforms=transforms),
            plgpu.SMEM((STAGES, SIZE), jnp.float32),
            plgpu.SMEM(TILE_SHAPE, keys.dtype),
            plgpu.SMEM(TILE_SHAPE, values.dtype),
            plgpu.SMEM((repeats, 2 * SIZE), jnp.float32),
            plgpu.Barrier(num_barriers=STAGES, num_arrivals=1 + spec.normalize),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(batch, groups, splits),
        grid_names=("b", "g", "split"),
        kernel_name="decode_step",
    )
    return kernel(jnp.reshape(layer, (1,)), kv, key_sum, keys, values, folded, length, q, k, v, log_decay)
