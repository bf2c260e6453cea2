"""What decoding folds into its states, as in `pallas_kernels.decoding.fold`: S' = g S + sum_t w_t phi(k_t) v_t^T.

One pass over S, in place. The tiles of the rows that are due are dealt out in equal parts to a fixed number of
programs, more than any GPU runs at once. What is added to a tile, of rank r, is a product on the tensor cores with the
accuracy of float32: each operand is the sum of three in bfloat16, and of their products those below 2^-24 are left out.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax

from pallas_kernels.decoding.contract import DEGREE, SIZE, plan, unsupported_fold
from pallas_kernels.triton.call import call, cdiv
from pallas_kernels.triton.decoding.features import features
from pallas_kernels.triton.device import capability, like

PROGRAMS = 4096  # at most: several for each that a GPU runs at once, so that the last ones leave little of it idle
TOKENS = 16  # at a time: the fewest of a product on tensor cores


@dataclasses.dataclass(frozen=True)
class FoldTiles:
    """How the work is cut.

    Attributes:
      height: rows of the state in a tile.
      num_warps: of a program.
      num_stages: tiles in flight within a program; 1 leaves that to the many programs.
    """

    height: int
    num_warps: int
    num_stages: int


TILES = {
    80: FoldTiles(height=32, num_warps=4, num_stages=1),
    86: FoldTiles(height=32, num_warps=4, num_stages=1),
    90: FoldTiles(height=32, num_warps=4, num_stages=1),
    100: FoldTiles(height=16, num_warps=4, num_stages=1),
}


def unsupported(kv, keys, values, size: int) -> str | None:
    """Why the kernel cannot fold tokens of rings [..., K] and [..., V] into states [..., D, V], or None.

    It takes any number of them, a block at a time.
    """
    del size
    return unsupported_fold(kv, keys, values)


@triton.jit
def _split(x):
    """Three in bfloat16 whose sum is x."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_product(x, y, total):
    """total + x y, of float32 x and bfloat16 or float32 y, with the accuracy of float32: small terms first."""
    x1, x2, x3 = _split(x)
    if y.dtype == tl.bfloat16:
        total = tl.dot(x3, y, total)
        total = tl.dot(x2, y, total)
        return tl.dot(x1, y, total)
    y1, y2, y3 = _split(y)
    total = tl.dot(x3, y1, total)
    total = tl.dot(x2, y2, total)
    total = tl.dot(x1, y3, total)
    total = tl.dot(x2, y1, total)
    total = tl.dot(x1, y2, total)
    return tl.dot(x1, y1, total)


@triton.jit
def fold_kernel(
    plan_ptr, keys_ptr, values_ptr, weights_ptr, carry_ptr, kv_ptr, sum_ptr, before_ptr, before_sum_ptr,
    L: tl.constexpr, B: tl.constexpr, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    N: tl.constexpr, COUNT: tl.constexpr, SQUARED: tl.constexpr, PROGRAMS: tl.constexpr, HEIGHT: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the tiles of all states that are due; plan: how many rows are due, their order, where they start."""
    TILES: tl.constexpr = (D + HEIGHT - 1) // HEIGHT
    total = tl.load(plan_ptr) * (L * G * TILES)
    share = (total + PROGRAMS - 1) // PROGRAMS
    first = tl.program_id(0) * share
    row = tl.arange(0, HEIGHT)
    column = tl.arange(0, V)
    token = tl.arange(0, TOKENS)
    for step in tl.range(first, tl.minimum(first + share, total), num_stages=STAGES):
        item = step // TILES
        d = step % TILES * HEIGHT + row
        b = tl.load(plan_ptr + 1 + item // (L * G))
        start = tl.load(plan_ptr + 1 + B + b)
        in_row = item % (L * G)
        state = (in_row // G * B + b).to(tl.int64) * G + in_row % G
        # 64-bit before they meet a stride; within a tile, 32 bits.
        at = d[:, None] * V + column[None, :]
        there = d < D
        kv = tl.load(kv_ptr + state * (D * V) + at, mask=there[:, None], other=0.0)
        key_sum = tl.load(sum_ptr + state * D + d, mask=there, other=0.0)
        if before_ptr is not None:
            tl.store(before_ptr + state * (D * V) + at, kv, mask=there[:, None])
            tl.store(before_sum_ptr + state * D + d, key_sum, mask=there)

        keys_from = keys_ptr + (state * N + start) * K
        values_from = values_ptr + (state * N + start) * V
        added = tl.zeros((HEIGHT, V), tl.float32)
        added_sum = tl.zeros((HEIGHT,), tl.float32)
        for t in range(0, COUNT, TOKENS):
            waits = t + token < COUNT
            # Beyond the tokens the last one again, with a weight of 0: what lies there may be anything.
            slot = tl.minimum(t + token, COUNT - 1)
            weight = tl.load(weights_ptr + state * COUNT + t + token, mask=waits, other=0.0)
            phi = features(keys_from + slot[None, :] * K, d[:, None], 1.0, K, SQUARED) * weight[None, :]
            value = tl.load(values_from + slot[:, None] * V + column[None, :])
            added = _add_product(phi, value, added)
            added_sum += tl.sum(phi, 1)

        carry = tl.load(carry_ptr + state)
        new = kv.to(tl.float32) * carry + added
        tl.store(kv_ptr + state * (D * V) + at, new.to(kv_ptr.dtype.element_ty), mask=there[:, None])
        tl.store(sum_ptr + state * D + d, key_sum * carry + added_sum, mask=there)


def fold(score: Literal["linear", "squared"], state, previous, keys, values, start, log_weights, log_carry, due):
    """exp(log_carry) S + sum_t exp(log_weights_t) phi(k_t) v_t^T in the rows that are due; key_sum without the v_t.

    Sums are in float32, and products are as accurate. What a row becomes depends on nothing of another. States that are
    donated, or carried by a loop, are changed where they lie.

    Args:
      score: whose features phi are, in the order of `twomamba_jax.ops.score`: D is 64 or 2080.
      state: the pair of kv [L, B, G, D, 64], float32 or bfloat16, and key_sum [L, B, G, D] float32.
      previous: such a pair, which takes the state as it was in the rows that are due; or None.
      keys: [L, B, G, N, 64] float32 or bfloat16.
      values: [L, B, G, N, 64] float32 or bfloat16.
      start: which of the N a row's first token is, int32 [B].
      log_weights: of the r tokens from there on, [L, B, G, r] float32.
      log_carry: [L, B, G] float32.
      due: bool [B].

    Returns:
      (state, previous), in the structure that they came in.
    """
    arrays, structure = jax.tree.flatten((state, previous))
    cut = TILES[like(capability())]
    sizes = constexprs(score, cut, arrays[0].shape, keys.shape[3], log_weights.shape[-1])

    @jax.custom_batching.sequential_vmap  # jax-triton has no rule of its own
    def run(due, start, keys, values, log_weights, log_carry, *arrays):
        # XLA would merge the kernel with slices that it takes, or that its results become, whatever arrays they belong
        # to; and nothing would say then that it works in place. Barriers keep them apart.
        arrays, keys, values = lax.optimization_barrier((arrays, keys, values))
        operands = [plan(due, start), keys, values, jnp.exp(log_weights), jnp.exp(log_carry), *arrays]
        after = call(
            fold_kernel,
            *operands,
            *([None] * (9 - len(operands))),
            out_type=(),
            grid=(sizes["PROGRAMS"],),
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            name="fold",
            aliases=tuple(range(5, len(operands))),
            **sizes,
        )
        return lax.optimization_barrier(after)

    return structure.unflatten(run(due, start, keys, values, log_weights, log_carry, *arrays))


def constexprs(score: str, cut: FoldTiles, shape: tuple[int, ...], slots: int, tokens: int) -> dict:
    """What is compiled into the kernel that folds `tokens` of rings of `slots` into states of a shape."""
    layers, batch, groups, size, _ = shape
    return {
        "L": layers,
        "B": batch,
        "G": groups,
        "D": size,
        "K": SIZE,
        "V": SIZE,
        "N": slots,
        "COUNT": tokens,
        "SQUARED": DEGREE[score] == 2,
        "PROGRAMS": min(PROGRAMS, layers * batch * groups * cdiv(size, cut.height)),
        "HEIGHT": cut.height,
        "TOKENS": TOKENS,
        "STAGES": cut.num_stages,
    }
