"""What a model remembers between calls: a pytree with a static shape.

A cache can be copied, saved and restored like any pytree, to go on from one prompt more than once. With `rollback=True`
its last tokens can be taken back.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.layers.execution import Execution
from twomamba_jax.ops.decoding import cached_attention
from twomamba_jax.ops.decoding.cached_attention import FOLD_SIZE, DecodingCache, init_decoding_cache
from twomamba_jax.ops.decoding.new_tokens import NewTokens
from twomamba_jax.ops.integers import Integer, checked_integer
from twomamba_jax.ops.score import SCORES
from twomamba_jax.ops.sharding import check_multiple
from twomamba_jax.ops.state import state_bytes
from twomamba_jax.shapes import AnyArray, Array, Float, Int


class ConvolutionInputs(NamedTuple):
    """The last M inputs of a mixer's convolutions: W - 1, and as many more as tokens can be taken back.

    Queries and keys that heads share are here once a group.
    """

    q: Float[Array, "B M H K"]
    k: Float[Array, "B M G K"]
    v: Float[Array, "B M G V"]


class MixerCache(NamedTuple):
    """The operation's cache, and the convolution's inputs (None where the mixer has no convolution).

    What new tokens leave behind is one too: of those of the operation, and the convolution's next inputs.

    Examples:
      >>> cache = init_cache(config, batch=1, max_length=32)
      >>> cache.layers[0].convolution.v.shape  # both layers' last input of a convolution over two
      (2, 1, 1, 2, 4)
    """

    attention: DecodingCache | NewTokens
    convolution: ConvolutionInputs | None


class Cache(NamedTuple):
    """One `MixerCache` a layer run, its arrays with a leading layer axis, and the next token's position.

    `rollback_left` is how many tokens of each row can be taken back now (below 0: too many were), and `rollback_limit`
    the most that ever can; both are None where none can.

    Examples:
      >>> cache = init_cache(config, batch=1, max_length=32)
      >>> len(cache.layers), cache.position.tolist()  # both layers have equal mixers
      (1, [0])
    """

    layers: tuple[MixerCache, ...]
    position: Int[Array, "B"]
    rollback_left: Int[Array, "B"] | None = None
    rollback_limit: Int[Array, ""] | None = None


def init_cache(
    config: ModelConfig,
    batch: Integer,
    max_length: Integer,
    *,
    fold_size: Integer = FOLD_SIZE,
    rollback: bool = False,
    dtype=jnp.float32,
    state_dtype=jnp.float32,
) -> Cache:
    """The empty cache of a model.

    Args:
      config: the model's.
      batch: B.
      max_length: tokens that key/value caches can hold. Finite states ignore it: theirs is a constant size.
      fold_size: r, the tokens that a finite state takes in at a time; until then they wait and are attended directly.
        The state is read once per token and written once in r.
      rollback: whether `roll_back` will be called, for up to r tokens. Finite states are then kept twice.
      dtype: of cached keys, values and convolution inputs: the `Execution.dtype` of the model. Decays and normalisers
        are float32 or wider.
      state_dtype: of finite states. bfloat16 halves them, and rounds them at every fold (docs/inference.md).

    Under a mesh and logical axis rules each device makes its rows and heads alone.

    Raises:
      ValueError: batch, max_length or fold_size below 1; a batch or heads that are no multiple of the devices that they
        are sharded over.

    Examples:
      >>> cache = init_cache(config, batch=1, max_length=32, rollback=True)
      >>> logits, cache = apply({"params": params}, tokens, cache=cache)
      >>> logits.shape, cache.position.tolist()
      ((1, 4, 16), [4])
    """
    batch, max_length = checked_integer("batch", batch), checked_integer("max_length", max_length)
    fold_size = checked_integer("fold_size", fold_size)
    rows, heads = nn.logical_to_mesh_axes(("batch", "heads"))
    check_multiple(batch, "rows of the batch", rows)
    check_multiple(config.kv_heads, "key/value heads", heads)
    options = {"fold_size": fold_size, "rollback": rollback, "dtype": dtype, "state_dtype": state_dtype}
    return _init_cache(config, batch, max_length, tuple(options.items()), tuple(nn.get_logical_axis_rules()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _init_cache(config: ModelConfig, batch: int, max_length: int, options: tuple, rules: tuple) -> Cache:
    """`init_cache` as a program, so that no device holds what belongs to others; `rules` tells JAX of a change."""
    options = dict(options)

    def stacked(mixer: MixerConfig, count: int) -> MixerCache:
        one = init_mixer_cache(mixer, config, batch, max_length, **options)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), one)

    position, left = jnp.zeros((2, batch), jnp.int32)
    cache = Cache(tuple(stacked(mixer, count) for mixer, count in config.layer_runs), position)
    if options["rollback"]:
        cache = cache._replace(rollback_left=left, rollback_limit=jnp.int32(options["fold_size"]))
    return _shard(cache, config)


def _shard(cache: Cache, config: ModelConfig) -> Cache:
    """The cache with its rows and heads over the axes of the mesh that the logical axis rules name."""

    def constrain(x, *names):
        return nn.with_logical_constraint(x, (*names, *[None] * x.ndim)[: x.ndim])

    def convolution(mixer: MixerConfig, inputs: ConvolutionInputs | None) -> ConvolutionInputs | None:
        if inputs is None:
            return None
        of_qk = "heads" if mixer.qk_groups is None else "qk_groups"
        return ConvolutionInputs(
            *(constrain(x, "layers", "batch", None, axis) for x, axis in zip(inputs, (of_qk, of_qk, "heads")))
        )

    layers = tuple(
        MixerCache(
            jax.tree.map(lambda x: constrain(x, "layers", "batch", "heads"), layer.attention),
            convolution(mixer, layer.convolution),
        )
        for layer, (mixer, _) in zip(cache.layers, config.layer_runs)
    )
    position, left = jax.tree.map(lambda x: constrain(x, "batch"), (cache.position, cache.rollback_left))
    return Cache(layers, position, left, cache.rollback_limit)


def init_mixer_cache(
    mixer: MixerConfig,
    config: ModelConfig,
    batch: int,
    max_length: int,
    *,
    fold_size: int = FOLD_SIZE,
    rollback: bool = False,
    dtype=jnp.float32,
    state_dtype=jnp.float32,
) -> MixerCache:
    """The empty cache of one layer; the arguments are those of `init_cache`."""
    qk_dim, kv_heads = mixer.qk_dim or config.head_dim, config.kv_heads
    attention = init_decoding_cache(
        mixer.score,
        batch,
        kv_heads,
        qk_dim,
        config.head_dim,
        capacity=None if SCORES[mixer.score].finite else max_length,
        fold_size=fold_size,
        rollback=rollback,
        decay=mixer.decay != "none",
        dtype=dtype,
        state_dtype=state_dtype,
    )
    if mixer.conv_width == 1:
        return MixerCache(attention, None)
    kept = mixer.conv_width - 1 + (fold_size if rollback else 0)

    def inputs(heads, size):
        return jnp.zeros((batch, kept, heads, size), dtype)

    groups = mixer.qk_groups
    q, k = inputs(groups or config.num_heads, qk_dim), inputs(groups or kv_heads, qk_dim)
    return MixerCache(attention, ConvolutionInputs(q, k, inputs(kv_heads, config.head_dim)))


def cache_bytes(config: ModelConfig, batch: Integer, max_length: Integer, **options) -> int:
    """The size in bytes of `init_cache` with these arguments; nothing is allocated.

    Examples:
      >>> cache_bytes(config, batch=1, max_length=32) == cache_bytes(config, batch=1, max_length=32_000)
      True
    """
    return state_bytes(jax.eval_shape(lambda: init_cache(config, batch, max_length, **options)))


def write(mixer: MixerConfig, cache: MixerCache, new: MixerCache, execution: Execution) -> MixerCache:
    """The cache with what a mixer's new tokens left behind, `new`. An axis may lead, as of layers in a stack."""
    attention = cached_attention.write(
        cache.attention,
        new.attention,
        score=mixer.score,
        implementation=execution.implementation,
        precision=execution.precision,
        partition=_partition(),
    )
    return MixerCache(attention, new.convolution)


def _partition():
    """The mesh axes of queries [B, T, H, K], by the logical axis rules."""
    return nn.logical_to_mesh_axes(("batch", "length", "heads", "head_dim"))


def advance(cache: Cache, layers: tuple[MixerCache, ...], counts) -> Cache:
    """The cache after `counts [B]` more tokens, which left `layers` behind."""
    left, limit = cache.rollback_left, cache.rollback_limit
    if left is not None:
        left = jnp.where(left < 0, left, jnp.minimum(left + counts, limit))
    return Cache(layers, cache.position + counts, left, limit)


def roll_back(cache: Cache, counts: Integer | Int[AnyArray, "B"]) -> Cache:
    """The cache without the last `counts` tokens of each row.

    The calls that follow give bit for bit what they would have given had those tokens never been there. At most r
    tokens can be taken back, counted from the furthest that the row has been, and not beyond the start of the last
    document of a packed prompt.

    Args:
      cache: made by `init_cache(..., rollback=True)`.
      counts: the tokens to take back, at least 0; an integer for all rows or one for each.

    Raises:
      ValueError: a cache without rollback; more tokens than can be taken back (inside `jax.jit`, where that cannot be
        raised, the rows where it happens are NaN from there on).

    Examples:
      >>> cache = init_cache(config, batch=1, max_length=32, rollback=True)
      >>> _, cache = apply({"params": params}, tokens, cache=cache)
      >>> roll_back(cache, 3).position.tolist()
      [1]
    """
    if cache.rollback_left is None:
        raise ValueError("this cache cannot be rolled back: make it with init_cache(..., rollback=True)")
    cache = jax.tree.map(jnp.asarray, cache)
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), cache.position.shape)
    left = cache.rollback_left - counts
    wrong = (counts < 0) | (left < 0)
    if not isinstance(wrong, jax.core.Tracer) and np.any(wrong):
        raise ValueError(
            f"cannot roll back {np.asarray(counts).tolist()} tokens: {np.asarray(cache.rollback_left).tolist()} can be "
            f"taken back now, and never more than fold_size={int(cache.rollback_limit)}"
        )

    def before(inputs):
        """Convolution inputs [layers, B, M, ...] shifted back by `counts`; what was before them is not known: 0."""
        index = jnp.arange(inputs.shape[2])[None] - counts[:, None]
        index = index.reshape(1, *index.shape, *[1] * (inputs.ndim - 3))
        return jnp.where(index >= 0, jnp.take_along_axis(inputs, jnp.maximum(index, 0), axis=2), 0)

    partition = _partition()
    layers = tuple(
        MixerCache(
            cached_attention.roll_back(layer.attention, counts, partition), jax.tree.map(before, layer.convolution)
        )
        for layer in cache.layers
    )
    return Cache(layers, cache.position - counts, jnp.where(wrong, -1, left), cache.rollback_limit)


def poison_rollback(logits, cache: Cache):
    """`logits [B, ...]` with NaN in the rows in which too many tokens were taken back."""
    if cache.rollback_left is None:
        return logits
    return jnp.where((cache.rollback_left < 0).reshape(-1, *[1] * (logits.ndim - 1)), jnp.nan, logits)
