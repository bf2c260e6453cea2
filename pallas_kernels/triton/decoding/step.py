"""One token's attention in a step of decoding, as in `pallas_kernels.decoding.step`, whose arguments it takes.

It reads the state once and does little else, so it needs many loads in flight: small programs, each with a few tiles
of one head's state, so many that any GPU is full of them whatever its number of multiprocessors; and one program per
head for the ring. A tile is an array [groups, lanes, values] with as many lanes, its rows, as the threads of a program
load at once, 16 bytes each: the sum over groups stays within a thread, and that over lanes is taken once, at the end.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.decoding.contract import SIZE, DecodeStep, padded, unsupported_step
from pallas_kernels.triton.call import call, cdiv
from pallas_kernels.triton.decoding.features import features
from pallas_kernels.triton.device import capability, like

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 2048  # that share the work where there is enough of it: several for each multiprocessor of any GPU

unsupported = unsupported_step


@dataclasses.dataclass(frozen=True)
class StepTiles:
    """How the work is cut.

    Attributes:
      height: rows of the state that a program loads at a time.
      tiles: that a program reads one after the other, at most.
      ring: slots of the ring at a time. Its registers, beside those for the state, decide which of them ptxas spills.
      num_warps: of a program.
      num_stages: tiles in flight within a program; 1 leaves that to the many programs.
    """

    height: int
    tiles: int
    ring: int
    num_warps: int
    num_stages: int


TILES = {
    80: StepTiles(height=64, tiles=8, ring=16, num_warps=4, num_stages=1),
    86: StepTiles(height=64, tiles=8, ring=32, num_warps=4, num_stages=1),
    90: StepTiles(height=64, tiles=8, ring=32, num_warps=4, num_stages=1),
    100: StepTiles(height=64, tiles=8, ring=32, num_warps=4, num_stages=1),
}


@triton.jit
def _store(y_ptr, r, numerator, through_state, of_ring, V: tl.constexpr, NORMALIZE: tl.constexpr):
    """Numerators [V] and two scalars V times each, of query r."""
    column = tl.arange(0, V)
    y_ptr += r * ((3 if NORMALIZE else 1) * V)
    tl.store(y_ptr + column, numerator)
    if NORMALIZE:
        nothing = tl.zeros((V,), tl.float32)
        tl.store(y_ptr + V + column, nothing + through_state)
        tl.store(y_ptr + 2 * V + column, nothing + of_ring)


@triton.jit
def _attend_state(
    q_ptr, kv_ptr, z_ptr, decay_ptr, y_ptr, first, last,
    D: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr, SCALE: tl.constexpr,
    SQUARED: tl.constexpr, NORMALIZE: tl.constexpr, HEIGHT: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tiles `first`, ..., `last` - 1 of the state of one head."""
    GROUPS: tl.constexpr = HEIGHT // LANES
    row = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    column = tl.arange(0, V)
    sums = (tl.zeros((LANES, V), tl.float32),) * R
    denominators = (tl.zeros((LANES,), tl.float32),) * R
    for n in tl.range(first, last, num_stages=STAGES):
        d = n * HEIGHT + row
        tile = tl.load(kv_ptr + d[:, :, None] * V + column[None, None, :], mask=(d < D)[:, :, None], other=0.0)
        tile = tile.to(tl.float32)
        if NORMALIZE:
            z = tl.load(z_ptr + d, mask=d < D, other=0.0)
        new_sums = ()
        new_denominators = ()
        for r in tl.static_range(R):
            phi = features(q_ptr + r * K, d, SCALE, K, SQUARED)
            new_sums = new_sums + (sums[r] + tl.sum(tile * phi[:, :, None], 0),)  # noqa: RUF005
            if NORMALIZE:
                new_denominators = new_denominators + (denominators[r] + tl.sum(z * phi, 0),)  # noqa: RUF005
        sums = new_sums
        if NORMALIZE:
            denominators = new_denominators

    total = tl.zeros((K,), tl.float32)
    for slot in range(0, PADDED, K):
        total += tl.load(decay_ptr + slot + tl.arange(0, K))
    weight = tl.exp2(tl.sum(total, 0) * LOG2_E)
    for r in tl.static_range(R):
        through_state = tl.sum(denominators[r], 0) * weight
        _store(y_ptr, r, tl.sum(sums[r], 0) * weight, through_state, 0.0, V, NORMALIZE)


@triton.jit
def _age(slot, newest, N: tl.constexpr):
    """How many tokens before the new one the token of a slot is: 0 for the new one, N beyond the ring."""
    return tl.where(slot < N, newest - slot + tl.where(slot > newest, N, 0), N)


@triton.jit
def _attend_ring(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, decay_ptr, y_ptr, folded, length,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RING: tl.constexpr, SCALE: tl.constexpr,
    SQUARED: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The ring of one head, and the new token, which is not in it yet. Slots whose token does not wait are not read."""
    index = tl.arange(0, K)
    column = tl.arange(0, V)
    block = tl.arange(0, RING)
    waiting = length - folded
    newest = length % N  # slot
    key = tl.load(k_ptr + index)
    value = tl.load(v_ptr + column)
    sums = (tl.zeros((V,), tl.float32),) * R
    denominators = (tl.zeros((RING,), tl.float32),) * R
    for at in range(0, N, RING):
        slot = at + block
        age = _age(slot, newest, N)
        total = tl.zeros((RING,), tl.float32)
        for other in range(0, N, RING):
            later = _age(other + block, newest, N)[:, None] < age[None, :]
            decay = tl.load(decay_ptr + other + block)
            total += tl.sum(tl.where(later, decay[:, None], 0.0), 0)
        weights = tl.exp2(tl.where(age <= waiting, total * LOG2_E, -float("inf")))
        read = ((age > 0) & (age <= waiting))[:, None]
        new = (age == 0)[:, None]
        keys = tl.load(keys_ptr + slot[:, None] * K + index[None, :], mask=read, other=0.0)
        keys = tl.where(new, key[None, :], keys).to(tl.float32)
        values = tl.load(values_ptr + slot[:, None] * V + column[None, :], mask=read, other=0.0)
        values = tl.where(new, value[None, :], values).to(tl.float32)
        new_sums = ()
        new_denominators = ()
        for r in tl.static_range(R):
            scores = tl.sum(keys * features(q_ptr + r * K, index, SCALE, K, False)[None, :], 1)
            if SQUARED:
                scores = scores * scores
            scores = scores * weights
            new_sums = new_sums + (sums[r] + tl.sum(values * scores[:, None], 0),)  # noqa: RUF005
            new_denominators = new_denominators + (denominators[r] + scores,)  # noqa: RUF005
        sums = new_sums
        denominators = new_denominators
    for r in tl.static_range(R):
        _store(y_ptr, r, sums[r], 0.0, tl.sum(denominators[r], 0), V, NORMALIZE)


@triton.jit
def decode_step_kernel(
    layer_ptr, kv_ptr, z_ptr, keys_ptr, values_ptr, folded_ptr, length_ptr, q_ptr, k_ptr, v_ptr, decay_ptr, y_ptr,
    B: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    N: tl.constexpr, PADDED: tl.constexpr, SCALE: tl.constexpr, SQUARED: tl.constexpr, NORMALIZE: tl.constexpr,
    TILES: tl.constexpr, HEIGHT: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Program (b G + g, 0): the ring of a head. Program (b G + g, p): the p-th TILES tiles of its state."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    layer = tl.load(layer_ptr).to(tl.int64)
    in_stack = layer * (B * G) + head
    q_ptr += head.to(tl.int64) * (R * K)
    decay_ptr += head.to(tl.int64) * PADDED
    y_ptr += (part.to(tl.int64) * (B * G) + head) * (R * (3 if NORMALIZE else 1) * V)
    if part == 0:
        at = layer * B + head // G
        _attend_ring(
            q_ptr, k_ptr + head.to(tl.int64) * K, v_ptr + head.to(tl.int64) * V, keys_ptr + in_stack * (N * K),
            values_ptr + in_stack * (N * V), decay_ptr, y_ptr, tl.load(folded_ptr + at), tl.load(length_ptr + at),
            N, K, V, R, RING, SCALE, SQUARED, NORMALIZE,
        )  # fmt: skip
    else:
        first = (part - 1) * TILES
        last = tl.minimum(first + TILES, (D + HEIGHT - 1) // HEIGHT)
        _attend_state(
            q_ptr, kv_ptr + in_stack * (D * V), z_ptr + in_stack * D, decay_ptr, y_ptr, first, last,
            D, K, V, R, PADDED, SCALE, SQUARED, NORMALIZE, HEIGHT, LANES, STAGES,
        )  # fmt: skip


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
    batch, groups, repeats, _ = q.shape
    cut = TILES[like(capability())]
    sizes = constexprs(spec, cut, batch, groups, repeats, kv, keys.shape[3])
    parts = num_parts(kv.shape[3], cut, sizes)
    shape = parts, batch, groups, repeats, 3 if spec.normalize else 1, SIZE

    @jax.custom_batching.sequential_vmap  # jax-triton has no rule of its own
    def run(layer, *arrays):
        (y,) = call(
            decode_step_kernel,
            *(jnp.reshape(layer, (1,)), *arrays),
            out_type=(jax.ShapeDtypeStruct(shape, jnp.float32),),
            grid=(batch * groups, parts),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            name="decode_step",
            **sizes,
        )
        return y

    return run(layer, kv, key_sum, keys, values, folded, length, q, k, v, log_decay)


def constexprs(spec: DecodeStep, cut: StepTiles, batch: int, groups: int, repeats: int, kv, slots: int) -> dict:
    """What is compiled into the kernel, for states kv [L, B, G, D, 64] and rings of `slots`."""
    size = kv.shape[3]
    count = cdiv(size, cut.height)
    per_program = min(max(count * batch * groups // PROGRAMS, 1), cut.tiles)
    return {
        "B": batch,
        "G": groups,
        "R": repeats,
        "D": size,
        "K": SIZE,
        "V": SIZE,
        "N": slots,
        "PADDED": padded(slots),
        "SCALE": spec.scale,
        "SQUARED": spec.score == "squared",
        "NORMALIZE": spec.normalize,
        "TILES": cdiv(count, cdiv(count, per_program)),  # alike in all programs of a head
        "HEIGHT": cut.height,
        "LANES": 32 * cut.num_warps * 16 // (SIZE * kv.dtype.itemsize),
        "STAGES": cut.num_stages,
        "RING": cut.ring,
    }


def num_parts(size: int, cut: StepTiles, sizes: dict) -> int:
    """Programs of a head: one for its ring, the others for the `size` features of its state."""
    return 1 + cdiv(cdiv(size, cut.height), sizes["TILES"])
