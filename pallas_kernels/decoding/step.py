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

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.accumulator import COLUMN, ROW, TILE, columns, load_vector, rows
from pallas_kernels.decoding.contract import SIZE, DecodeStep, padded, unsupported_step
from pallas_kernels.device import in_32_bits, multiprocessors
from pallas_kernels.launch import Refs, launch

TILE_SHAPE = (SIZE, SIZE)  # features of the state, or slots of the ring, by values
PROGRAMS = 8  # that share the work, at least, for each multiprocessor
STAGES = 3  # tiles of the state in flight for each program


unsupported = unsupported_step


class Inputs(NamedTuple):
    """Arrays of the kernel, in the shapes that `decode_step` takes; layer is [1]."""

    layer: Any
    kv: Any
    key_sum: Any
    keys: Any
    values: Any
    folded: Any
    length: Any
    q: Any
    k: Any
    v: Any
    log_decay: Any


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
    repeats, tiles = q.shape[2], -(-features // SIZE)
    splits = max(1, min(tiles // 2, -(-PROGRAMS * multiprocessors() // (batch * groups))))
    per_split = -(-tiles // splits)
    splits = -(-tiles // per_split)
    swizzle = 128
    transforms = plgpu.TilingTransform((8, swizzle // kv.dtype.itemsize)), plgpu.SwizzleTransform(swizzle)
    return launch(
        functools.partial(_body, spec, per_split),
        Inputs(jnp.reshape(layer, (1,)), kv, key_sum, keys, values, folded, length, q, k, v, log_decay),
        jax.ShapeDtypeStruct((splits, batch, groups, repeats, 3 if spec.normalize else 1, SIZE), jnp.float32),
        {
            "kv": plgpu.SMEM((STAGES, *TILE_SHAPE), kv.dtype, transforms=transforms),
            "key_sum": plgpu.SMEM((STAGES, SIZE), jnp.float32),
            "keys": plgpu.SMEM(TILE_SHAPE, keys.dtype),
            "values": plgpu.SMEM(TILE_SHAPE, values.dtype),
            "q": plgpu.SMEM((repeats, 2 * SIZE), jnp.float32),
            "full": plgpu.Barrier(num_barriers=STAGES, num_arrivals=1 + spec.normalize),
            "ring_full": plgpu.Barrier(num_arrivals=2),
        },
        grid=(batch, groups, splits),
        grid_names=("b", "g", "split"),
        kernel_name="decode_step",
    )


class _Program(NamedTuple):
    """A program.

    state: which it has, by layer, batch entry and group; first, end: its tiles of it.
    """

    spec: DecodeStep
    refs: Refs
    state: tuple[Any, Any, Any]
    first: Any
    end: Any

    @property
    def slots(self) -> int:
        """N, of a ring."""
        return self.refs.inputs.keys.shape[3]

    @property
    def ring_tiles(self) -> int:
        """Tiles of a ring."""
        return padded(self.slots) // SIZE


class _Token(NamedTuple):
    """The new token.

    queries: of its heads, times the scale; slot: in the ring; waiting: how many tokens before it are not in the state.
    """

    queries: list[Any]
    key: Any
    value: Any
    slot: Any
    waiting: Any


def _body(spec: DecodeStep, per_split: int, refs: Refs) -> None:
    b, g, split = lax.axis_index("b"), lax.axis_index("g"), lax.axis_index("split")
    state, tiles = (refs.inputs.layer[0], b, g), -(-refs.inputs.kv.shape[3] // SIZE)
    first, end = split * per_split, lax.min((split + 1) * per_split, tiles)
    program = _Program(spec, refs, state, first, end)
    last = refs.outputs.shape[0] - 1
    ring_end = lax.select(split == last, program.ring_tiles, 0)  # the last program has the ring
    for i in range(min(STAGES, per_split)):
        pl.when(first + i < end)(lambda i=i: _copy_state(program, first + i))
    pl.when(ring_end > 0)(lambda: _copy_ring(program, 0))

    # Small, and in flight at the same time as the first tiles.
    token = _load_token(program)
    state_weight = jnp.exp(sum(_decays(program, t, ROW) for t in range(program.ring_tiles)).sum())
    for r, query in enumerate(token.queries):
        refs.scratch.q[r, pl.ds(0, SIZE)] = query
        refs.scratch.q[r, pl.ds(SIZE, SIZE)] = query
    plgpu.commit_smem()

    repeats = len(token.queries)
    zeros = [plgpu.layout_cast(jnp.zeros(TILE_SHAPE, jnp.float32), TILE)] * repeats
    none = [_vector(0.0)] * (repeats if spec.normalize else 0)
    sums, through_state = lax.fori_loop(first, end, functools.partial(_state_tile, program, token), (zeros, none))
    sums = [acc * state_weight for acc in sums]
    sums, of_ring = lax.fori_loop(0, ring_end, functools.partial(_ring_tile, program, token), (sums, none))
    for r, acc in enumerate(sums):
        refs.outputs[split, b, g, r, 0] = acc.sum(0)
        if spec.normalize:
            refs.outputs[split, b, g, r, 1] = _vector(through_state[r].sum() * state_weight)
            refs.outputs[split, b, g, r, 2] = _vector(of_ring[r].sum())


def _vector(x):
    return plgpu.layout_cast(jnp.full((SIZE,), x, jnp.float32), ROW)


def _copy_state(program: _Program, n) -> None:
    """Sends for tile n of the state; the last one ends with it."""
    inputs, _, scratch = program.refs
    stage, at = lax.rem(n - program.first, STAGES), pl.ds(lax.min(n * SIZE, inputs.kv.shape[3] - SIZE), SIZE)
    full = scratch.full.at[stage]
    plgpu.copy_gmem_to_smem(inputs.kv.at[*program.state, at], scratch.kv.at[stage], full)
    if program.spec.normalize:
        plgpu.copy_gmem_to_smem(inputs.key_sum.at[*program.state, at], scratch.key_sum.at[stage], full)


def _copy_ring(program: _Program, t) -> None:
    """Sends for tile t of the ring; what it has beyond the ring's end has no weight."""
    inputs, _, scratch = program.refs
    size = min(program.slots, SIZE)
    for ref, buffer in ((inputs.keys, scratch.keys), (inputs.values, scratch.values)):
        tile = ref.at[*program.state, pl.ds(t * SIZE, size)]
        plgpu.copy_gmem_to_smem(tile, buffer.at[pl.ds(0, size)], scratch.ring_full)


def _load_token(program: _Program) -> _Token:
    inputs, (layer, b, g) = program.refs.inputs, program.state
    key, value = (load_vector(ref.at[b, g]) for ref in (inputs.k, inputs.v))
    heads = range(inputs.q.shape[2])
    queries = [load_vector(inputs.q.at[b, g, r]).astype(jnp.float32) * program.spec.scale for r in heads]
    waiting = inputs.length[layer, b] - inputs.folded[layer, b]
    return _Token(queries, key, value, lax.rem(inputs.length[layer, b], program.slots), waiting)


def _state_tile(program: _Program, token: _Token, n, carry):
    """Adds tile n of the state to the numerators, [64, 64] each, and the denominators through it."""
    spec, scratch = program.spec, program.refs.scratch
    sums, denominators = carry
    stage = lax.rem(n - program.first, STAGES)
    plgpu.barrier_wait(scratch.full.at[stage])
    tile = plgpu.load(scratch.kv.at[stage], layout=TILE, optimized=False).astype(jnp.float32)
    phi = _features(program, token, n)
    if spec.normalize:
        z = load_vector(scratch.key_sum.at[stage])
        denominators = [total + z * x for total, x in zip(denominators, phi, strict=True)]
    plgpu.commit_smem()  # everyone has read it
    pl.when(n + STAGES < program.end)(lambda: _copy_state(program, n + STAGES))
    return [acc + tile * rows(x, TILE_SHAPE) for acc, x in zip(sums, phi, strict=True)], denominators


def _features(program: _Program, token: _Token, n):
    """Tile n of the features of each query, 0 where the tile overlaps the one before it."""
    if program.spec.score == "linear":
        return token.queries
    features = program.refs.inputs.kv.shape[3]
    row = plgpu.broadcasted_iota(jnp.int32, (SIZE,), 0, layout=ROW)
    weight = lax.select(n == 0, 1.0, math.sqrt(2))
    weight = jnp.where(row >= n * SIZE - (features - SIZE), weight, 0.0)
    return [query * weight * _rotated(program, r, n) for r, query in enumerate(token.queries)]


def _rotated(program: _Program, r: int, n, layout=ROW):
    """Query r, rotated by n."""
    return load_vector(program.refs.scratch.q.at[r, pl.ds(n, SIZE)], layout)


def _ring_tile(program: _Program, token: _Token, t, carry):
    """Adds tile t of the ring to the numerators and to its denominators."""
    spec, scratch = program.spec, program.refs.scratch
    sums, denominators = carry
    weights, at = _ring_weights(program, token, t), token.slot - t * SIZE
    plgpu.barrier_wait(scratch.ring_full)

    @pl.when((at >= 0) & (at < SIZE))
    def _():
        scratch.keys[at], scratch.values[at] = token.key, token.value

    plgpu.commit_smem()
    tile = plgpu.load(scratch.keys, layout=TILE, optimized=False).astype(jnp.float32)
    queries = (_rotated(program, r, 0, COLUMN) for r in range(len(token.queries)))
    scores = [(tile * columns(query, TILE_SHAPE)).sum(1) for query in queries]
    if spec.score == "squared":
        scores = [x * x for x in scores]
    scores = [jnp.where(weights > 0, x * weights, 0.0) for x in scores]
    tile = plgpu.load(scratch.values, layout=TILE, optimized=False).astype(jnp.float32)
    tile = jnp.where(rows(weights, TILE_SHAPE) > 0, tile, 0.0)
    if program.ring_tiles > 1:
        plgpu.commit_smem()
        pl.when(t + 1 < program.ring_tiles)(lambda: _copy_ring(program, t + 1))
    sums = [acc + tile * rows(x, TILE_SHAPE) for acc, x in zip(sums, scores, strict=True)]
    if spec.normalize:
        denominators = [total + x for total, x in zip(denominators, scores, strict=True)]
    return sums, denominators


def _ring_weights(program: _Program, token: _Token, t):
    """The weights of a tile of the ring, 0 for slots without a token that waits."""
    slots = program.slots
    own = _age(slots, token.slot, t, ROW)

    def add(u, total):
        later = columns(_age(slots, token.slot, u, COLUMN), TILE_SHAPE) < rows(own, TILE_SHAPE)
        return total + jnp.where(later, columns(_decays(program, u, COLUMN), TILE_SHAPE), 0.0).sum(1)

    total = lax.fori_loop(0, program.ring_tiles, add, _vector(0.0))
    return jnp.where(own <= token.waiting, jnp.exp(total), 0.0)


def _age(slots: int, newest, t, layout):
    """How many tokens before the new one the token of a slot is: 0 for the new one, N beyond the ring."""
    slot = plgpu.broadcasted_iota(jnp.int32, (SIZE,), 0, layout=layout) + t * SIZE
    return jnp.where(slot < slots, newest - slot + jnp.where(slot > newest, slots, 0), slots)


def _decays(program: _Program, t, layout):
    """The log decays of a tile of the ring."""
    _, b, g = program.state
    return load_vector(program.refs.inputs.log_decay.at[b, g, pl.ds(t * SIZE, SIZE)], layout)
