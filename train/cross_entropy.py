"""The cross entropy of a language model from its last hidden states, without the logits of the whole batch.

    loss = sum_i w_i (log sum_v exp(l_iv) - l_i,target_i),      l = x W

In float32, l [B, T, vocab] is by far the largest array of a step. Here it exists for one chunk of tokens at a time, and
its gradient is taken while it does, in the forward pass:

    dl = w (softmax(l) - onehot(target)),      dx = dl W^T,      dW = sum over chunks of x^T dl

so that each logit is computed once; recomputing the chunks in the backward pass costs a fourth product as large as the
other three (docs/training.md has both measured).

Over a mesh every device goes through chunks of its own tokens: the tokens are cut into the devices' shares first and
then into chunks, and dW has a sum of its own for each share, which meet once, after the last chunk. A loop over chunks
of the whole batch would move tokens between the devices, and one sum of dW would be reduced over them at every chunk.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.layers.language_model import head_logits
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.ops.softmax_rows import places_of, softmax_rows
from twomamba_jax.shapes import AnyArray, Array, Float, Int

# A chunk's logits may be as large as the gradient of the head is, or as this many numbers (256 MiB in float32).
CHUNK_LOGITS = 2**26
NO_KERNELS = Elementwise()


class Sums(NamedTuple):
    """Sums over the targets of a batch, float32 or wider: weighted negative log likelihood, hits, and weight."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x: Float[AnyArray, "B T E"],
    kernel: Float[AnyArray, "E vocab"],
    targets: Int[AnyArray, "B T"],
    weights: Float[AnyArray, "B T"],
    chunk_size: int | None = None,
    shards: tuple[int, int] = (1, 1),
    elementwise: Elementwise = NO_KERNELS,
) -> Sums:
    """The sums of `softmax(x W)` against `targets`, by their weights. Only `loss` has a gradient, of x and the kernel.

    Logits, their log-sum-exp and all sums are float32 or wider, from operands of x's dtype, as the model's own logits
    are. dl enters its two products in x's dtype too; dW is summed in float32 or wider and returned in the kernel's
    dtype. A hit is a target that is the first of the largest logits.

    Args:
      x: the hidden states that the head takes (`LanguageModel(...)(tokens, apply_head=False)`).
      kernel: the head, in any floating dtype.
      targets: from 0 to vocab - 1.
      weights: data, whose gradient is 0.
      chunk_size: tokens of a device whose logits exist at once, at most, from 1; None: `CHUNK_LOGITS` decides.
      shards: how many shares the mesh cuts B and T into (`train.sharding.token_shards`); each must divide its own.
      elementwise: the kernels for what is taken of each token's logits, whose last axis is that of the vocabulary.

    Returns:
      `Sums`.
    """
    return _sums_and_gradients(x, kernel, targets, weights, chunk_size, shards, elementwise, differentiate=False)[0]


def num_chunks(tokens: int, width: int, vocab_size: int, chunk_size: int | None) -> int:
    """Chunks of a device's `tokens`: as few as `chunk_size` allows, or, where that is None, as `CHUNK_LOGITS` does."""
    return -(-tokens // (max(CHUNK_LOGITS // vocab_size, width) if chunk_size is None else chunk_size))


def _sums_and_gradients(x, kernel, targets, weights, chunk_size, shards, elementwise, differentiate):
    wide = accumulation_dtype(x.dtype)
    tokens = x.shape[0] * x.shape[1] // (shards[0] * shards[1])
    chunks = num_chunks(tokens, *kernel.shape, chunk_size)
    # Under fsdp each device has a part of the head: it is put together once, not at every chunk.
    head = nn.with_logical_constraint(kernel.astype(x.dtype), (None, "vocab"))

    def body(total, chunk):
        sums, dx, dw = _chunk(head, *chunk, elementwise, differentiate)
        return jax.tree.map(jnp.add, total, (sums, dw)), dx

    share = nn.with_logical_constraint(jnp.zeros((*shards, *kernel.shape), wide), ("batch", "length", None, "vocab"))
    start = Sums(*jnp.zeros((3, *shards), wide)), share if differentiate else None
    parts = tuple(_cut(array, shards, chunks) for array in (x, targets, weights.astype(wide)))
    (sums, dw), dx = jax.lax.scan(body, start, parts)
    sums = Sums(*(jnp.sum(part) for part in sums))
    if not differentiate:
        return sums, None
    dw = nn.with_logical_constraint(jnp.sum(dw, (0, 1)).astype(kernel.dtype), ("embed", "vocab"))
    return sums, (_join(dx, x.shape), dw)


def _chunk(head, x, targets, weights, elementwise, differentiate):
    """The sums [R, Q] of a chunk x [R, Q, C, E] of every share of the tokens, its dx, and dW [R, Q, E, vocab]."""
    logits = nn.with_logical_constraint(head_logits(x, head), ("batch", "length", None, "vocab"))
    rows = softmax_rows(logits, targets, elementwise)
    largest, log_total = rows.largest[..., None], jnp.log(rows.total)[..., None]
    # Not the log-sum-exp itself: where a target is nearly certain, its loss would be lost in the rounding of `largest`.
    losses = jnp.log(rows.total) - (rows.of_target - rows.largest)
    hits = rows.first_largest == targets
    sums = Sums(*(jnp.sum(part, axis=-1) for part in (weights * losses, weights * hits, weights)))
    if not differentiate:
        return sums, None, None
    is_target = places_of(logits) == targets[..., None]
    dl = (weights[..., None] * (jnp.exp(logits - largest - log_total) - is_target)).astype(x.dtype)
    wide = {"preferred_element_type": logits.dtype}
    dx = jnp.einsum("rqcv,ev->rqce", dl, head, **wide).astype(x.dtype)
    return sums, dx, jnp.einsum("rqce,rqcv->rqev", x, dl, **wide)


def _cut(array, shards, chunks):
    """[B, T, ...] -> [chunks, R, Q, C, ...]: each device's tokens in chunks, the last filled up with zeros."""
    (rows, pieces), (batch, length, *rest) = shards, array.shape
    array = array.reshape(rows, batch // rows, pieces, length // pieces, *rest)
    array = jnp.moveaxis(array, 2, 1).reshape(rows, pieces, -1, *rest)
    missing = -array.shape[2] % chunks
    if missing:
        array = jnp.pad(array, ((0, 0), (0, 0), (0, missing), *((0, 0) for _ in rest)))
    array = jnp.moveaxis(array.reshape(rows, pieces, chunks, -1, *rest), 2, 0)
    return nn.with_logical_constraint(array, (None, "batch", "length", None, *(None for _ in rest)))


def _join(parts, shape):
    """The inverse of `_cut`: [chunks, R, Q, C, E] -> [B, T, E]."""
    (_, rows, pieces, _, width), (batch, length, _) = parts.shape, shape
    tokens = jnp.moveaxis(parts, 0, 2).reshape(rows, pieces, -1, width)
    tokens = tokens[:, :, : batch * length // (rows * pieces)]
    tokens = tokens.reshape(rows, pieces, batch // rows, length // pieces, width)
    joined = jnp.moveaxis(tokens, 1, 2).reshape(shape)
    return nn.with_logical_constraint(joined, ("batch", "length", "embed"))


def _forward(*arguments):
    return _sums_and_gradients(*arguments, differentiate=True)


def _backward(chunk_size, shards, elementwise, gradients, cotangents):
    return *((cotangents.loss * gradient).astype(gradient.dtype) for gradient in gradients), None, None


cross_entropy.defvjp(_forward, _backward)
