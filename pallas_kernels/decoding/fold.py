"""What decoding folds into its states: S' = g S + sum_t w_t phi(k_t) v_t^T, in place, in a single pass over S.

The states of all layers lie in one stack, of which only the rows of the batch that are due are read and written. They
are far larger than everything else that this touches, so it is a question of bandwidth: tiles of S, whatever states
they belong to, are dealt out to the programs in equal parts and go through buffers in shared memory.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, TILE, columns, load_vector, rows
from pallas_kernels.decoding.contract import DEGREE, SIZE, merged, plan, unsupported_fold
from pallas_kernels.device import in_32_bits, multiprocessors
from pallas_kernels.launch import Refs, launch

HEIGHT = 64  # rows of a tile in registers: the features of one cyclic offset
WIDTH = SIZE  # values, and numbers of a key
LONGEST = 128  # tokens, whose keys and values lie in shared memory
BUFFERS = 3  # tiles in shared memory: one in registers, two on their way
SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor, of which a program takes 1 KiB more than it asks for
AT_ONCE = 8  # tokens whose keys and values are on their way together


class Inputs(NamedTuple):
    """Arrays of the kernel: `plan`'s, those of `fold`, with states of all layers, rows and groups beside each other.

    root: of the weights, as a factor on keys; now: kv and key_sum, which change; before: what takes them as they were.
    """

    plan: Any
    keys: Any
    values: Any
    root: Any
    carry: Any
    now: tuple[Any, Any]
    before: tuple[Any, Any] | None


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
    size, dtype = log_weights.shape[-1], arrays[0].dtype
    call = _Call(DEGREE[score], batch, groups, layers * groups, features, size)
    of_program = BUFFERS * call.height * (WIDTH * dtype.itemsize + 4) + 3 * WIDTH * 4 * size + 1200
    programs = min(multiprocessors() * (SHARED_MEMORY // of_program), batch * call.per_row * call.tiles)
    tiling = (plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))

    # XLA would merge the kernel with slices that it takes, or that its results become, whatever arrays they belong to;
    # and nothing would say then that it works in place. Barriers keep them apart.
    arrays, keys, values = lax.optimization_barrier((arrays, keys, values))
    now, before = structure.unflatten([jax.new_ref(merged(x)) for x in arrays])
    root = jnp.exp(log_weights / call.degree)
    launch(
        functools.partial(_body, call, programs),
        Inputs(
            plan(due, start),
            merged(keys),
            merged(values),
            merged(root),
            merged(jnp.exp(log_carry)),
            now,
            before,
        ),
        None,
        {
            "kv": plgpu.SMEM((BUFFERS, call.height, WIDTH), dtype, transforms=tiling),
            "key_sum": plgpu.SMEM((BUFFERS, call.height), jnp.float32),
            "keys": plgpu.SMEM((size, 2 * WIDTH), jnp.float32),
            "values": plgpu.SMEM((size, WIDTH), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=BUFFERS),
        },
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="fold",
    )
    after = lax.optimization_barrier([jax.freeze(ref) for ref in jax.tree.leaves((now, before))])
    return structure.unflatten(new.reshape(old.shape) for new, old in zip(after, arrays))


class _Call(NamedTuple):
    """The sizes of a call: `per_row` states of `features` rows in each of the batch's, and `size` tokens for each."""

    degree: int
    batch: int
    groups: int
    per_row: int
    features: int
    size: int

    @property
    def height(self) -> int:
        """Rows of a tile in shared memory."""
        return min(self.features, 2 * HEIGHT)

    @property
    def tiles(self) -> int:
        """Tiles of a state, of which the last may be cut off."""
        return -(-self.features // self.height)


class _Tile(NamedTuple):
    """A piece of work: a row, its state among all, the tile of that state, and the buffer that it goes through."""

    row: Any
    state: Any
    number: Any
    slot: Any

    @staticmethod
    def of(call: _Call, plan_ref, step) -> "_Tile":
        """That of a step."""
        item, tile = step // call.tiles, lax.rem(step, call.tiles)
        row = plan_ref[1 + item // call.per_row]
        layer, group = lax.rem(item, call.per_row) // call.groups, lax.rem(item, call.groups)
        return _Tile(row, (layer * call.batch + row) * call.groups + group, tile, lax.rem(step, BUFFERS))


def _body(call: _Call, programs: int, refs: Refs) -> None:
    inputs, scratch = refs.inputs, refs.scratch
    program = lax.axis_index("program")
    total = inputs.plan[0] * call.per_row * call.tiles
    share = (total + programs - 1) // programs
    first = program * share
    last = lax.min(first + share, total)

    def load(step):
        _copy(call, scratch, inputs.now, _Tile.of(call, inputs.plan, step), plgpu.copy_gmem_to_smem)

    def turn(step, _):
        tile = _Tile.of(call, inputs.plan, step)
        pl.when((step == first) | (tile.number == 0))(lambda: _stage(call, refs, tile))
        plgpu.barrier_wait(scratch.arrived.at[tile.slot])
        if inputs.before is not None:
            _copy(call, scratch, inputs.before, tile, _store)
        _advance(call, refs, tile)
        _copy(call, scratch, inputs.now, tile, _store)
        # The tile before this one has left the buffer that the next but one comes to.
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)
        pl.when(step + BUFFERS - 1 < last)(lambda: load(step + BUFFERS - 1))

    for ahead in range(BUFFERS - 1):
        pl.when(first + ahead < last)(lambda ahead=ahead: load(first + ahead))
    lax.fori_loop(first, last, turn, None)
    plgpu.wait_smem_to_gmem(0)


def _store(array, buffer, _) -> None:
    plgpu.copy_smem_to_gmem(buffer, array)


def _copy(call: _Call, scratch, pair, tile: _Tile, one) -> None:
    """One copy of a tile of kv, and one of its part of key_sum, by `one(array, buffer, barrier)`.

    What is past a state's end is neither read nor written: copies of tiled buffers see to that. Of a vector they cut
    off only what is past the end of all.
    """
    kv_ref, sum_ref = pair
    arrived = scratch.arrived.at[tile.slot]
    one(kv_ref.at[tile.state, pl.ds(tile.number * call.height, call.height), :], scratch.kv.at[tile.slot], arrived)
    whole = call.features // call.height  # tiles, but for the last where it is cut off
    for count, there in ((call.height, tile.number < whole), (call.features % call.height, tile.number == whole)):
        if count:

            @pl.when(there)
            def _(count=count):
                part = sum_ref.at[tile.state, pl.ds(tile.number * call.height, count)]
                one(part, scratch.key_sum.at[tile.slot, pl.ds(0, count)], arrived)


def _stage(call: _Call, refs: Refs, tile: _Tile) -> None:
    """Puts a state's keys times the root of their weight, twice in a row, and its values into shared memory."""
    blocks = call.size // AT_ONCE
    lax.fori_loop(0, blocks, lambda i, _: _stage_block(call, refs, tile, i * AT_ONCE, AT_ONCE), None)
    if call.size % AT_ONCE:
        _stage_block(call, refs, tile, blocks * AT_ONCE, call.size % AT_ONCE)
    plgpu.commit_smem()


def _stage_block(call: _Call, refs: Refs, tile: _Tile, at, count: int) -> None:
    """`_stage` for `count` tokens from `at` on."""
    inputs, _, scratch = refs
    at_ring = inputs.plan[1 + call.batch + tile.row] + at
    loaded = []
    for t in range(count):
        pair = (ref.at[tile.state, at_ring + t] for ref in (inputs.keys, inputs.values))
        key, value = (load_vector(x).astype(jnp.float32) for x in pair)
        loaded.append((key * inputs.root[tile.state, at + t], value))
    for t, (key, value) in enumerate(loaded):
        scratch.keys[at + t, pl.ds(0, WIDTH)] = key
        scratch.keys[at + t, pl.ds(WIDTH, WIDTH)] = key
        scratch.values[at + t] = value


def _advance(call: _Call, refs: Refs, tile: _Tile) -> None:
    """Takes the tokens into the tile in a buffer, and its part of key_sum."""
    scratch, halves = refs.scratch, range(call.height // HEIGHT)
    parts = [(tile.slot, pl.ds(half * HEIGHT, HEIGHT)) for half in halves]
    offsets = [tile.number * len(halves) + half for half in halves]
    scales = [jnp.where(offset == 0, 1.0, math.sqrt(2)).astype(jnp.float32) for offset in offsets]
    carry = refs.inputs.carry[tile.state]
    kv = [plgpu.load(scratch.kv.at[*part], layout=TILE) for part in parts]
    key_sum = [load_vector(scratch.key_sum.at[*part]) for part in parts]
    kv = [x.astype(jnp.float32) * carry for x in kv]
    key_sum = [x * carry for x in key_sum]

    def token(t, sums):
        key = load_vector(scratch.keys.at[t, pl.ds(0, WIDTH)])
        value = columns(load_vector(scratch.values.at[t], COLUMN), (HEIGHT, WIDTH))
        kv, key_sum = [], []
        for n in halves:
            phi = key
            if call.degree == 2:
                phi = key * scales[n] * load_vector(scratch.keys.at[t, pl.ds(offsets[n], WIDTH)])
            kv.append(sums[0][n] + rows(phi, (HEIGHT, WIDTH)) * value)
            key_sum.append(sums[1][n] + phi)
        return kv, key_sum

    kv, key_sum = lax.fori_loop(0, call.size, token, (kv, key_sum))
    if refs.inputs.before is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for n, part in enumerate(parts):
        scratch.kv[part] = kv[n].astype(scratch.kv.dtype)
        scratch.key_sum[part] = key_sum[n]
    plgpu.commit_smem()
