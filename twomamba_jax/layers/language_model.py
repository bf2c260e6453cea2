"""A causal language model: embedding, blocks of a mixer and an MLP, head."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.layers.cache import Cache, advance, poison_rollback, write
from twomamba_jax.layers.cache_stack import attach, detach
from twomamba_jax.layers.execution import REMATS, Execution
from twomamba_jax.layers.mixer import Copies, Mixer
from twomamba_jax.layers.mlp import PROJECTION_INIT, SwiGLU
from twomamba_jax.layers.norm import RMSNorm
from twomamba_jax.layers.partitioning import with_logical_axes
from twomamba_jax.layers.tokens import as_tokens
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.integers import Integer
from twomamba_jax.ops.kept import kept
from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.ops.segments import valid_tokens
from twomamba_jax.ops.sharding import devices_of
from twomamba_jax.shapes import AnyArray, Array, Float, Lengths, SegmentIds, Tokens


class Block(nn.Module, kw_only=True):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP.

    Attributes:
      config: the model's.
      mixer: this layer's.
      execution: how to compute it.
      cache_is_empty: as in `Mixer.__call__`.
    """

    config: ModelConfig
    mixer: MixerConfig
    execution: Execution
    cache_is_empty: bool = False

    @nn.compact
    def __call__(self, x, cache, layer, stack, segment_ids, lengths, positions):
        """x [B, T, E] and a `MixerCache` or None; returns the next x, and what `write` takes or None.

        Of a cache that `detach` took apart, `stack` is all layers' part and `layer` is the number of this one.
        """
        config, dtype, param_dtype = self.config, self.execution.dtype, self.execution.param_dtype
        # Only without a cache is there a backward pass, and the example that parameters are made for has none.
        trains = cache is None and not self.is_initializing()
        of_norm, of_mlp = (self.execution.elementwise(axis) if trains else Elementwise() for axis in ("embed", "mlp"))
        norm = {"eps": config.norm_eps, "dtype": dtype, "param_dtype": param_dtype, "elementwise": of_norm}
        cache, layer = attach(cache, stack, layer)
        # Kept for the backward pass, of which the other norm computes its result again: there is memory for one.
        residual, y, *copies = RMSNorm(name="mixer_norm", **norm)(x, copies=len(Copies._fields) + 1, keep=True)
        mixed, new = Mixer(
            self.mixer,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.kv_heads,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            output_norm_eps=config.output_norm_eps,
            execution=self.execution,
            name="mixer",
        )(
            y,
            copies=Copies(*copies),
            segment_ids=segment_ids,
            lengths=lengths,
            positions=positions,
            cache=cache,
            layer=layer,
            cache_is_empty=self.cache_is_empty,
            writes=False,
        )
        # Kept in the place of `mixed`, which only this sum needs.
        x = kept(nn.with_logical_constraint(residual + mixed, ("batch", "length", "embed")))
        if config.mlp_dim:
            residual, y = RMSNorm(name="mlp_norm", **norm)(x, copies=1)
            x = residual + SwiGLU(config.mlp_dim, dtype=dtype, param_dtype=param_dtype, elementwise=of_mlp, name="mlp")(
                y
            )
            x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return x, new


class LanguageModel(nn.Module):
    """The Llama-2 shape of Appendix B with a mixer of the 2Mamba family in each layer.

    Each run of layers with equal mixers (`ModelConfig.layer_runs`) is one `nn.scan`: its parameters carry a leading
    `layers` axis, whether or not it is a loop (`execution.scan_layers`).

    Attributes:
      config: what to compute.
      execution: how to compute it.

    Examples:
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3, 4]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> apply = jax.jit(model.apply)
      >>> apply({"params": params}, tokens).shape
      (1, 4, 16)
    """

    config: ModelConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        tokens: Tokens | Sequence[Sequence[Integer]],
        *,
        cache: Cache | None = None,
        segment_ids: SegmentIds | None = None,
        lengths: Lengths | Sequence[Integer] | None = None,
        cache_is_empty: bool = False,
        last_only: bool = False,
        apply_head: bool = True,
    ) -> Float[Array, "B N vocab"] | tuple[Float[Array, "B N vocab"], Cache]:
        """Logits of the token after each one, float32 or wider.

        Args:
          tokens: [B, T] integers from 0 to `vocab_size` - 1, any T >= 1. Inside `jax.jit`, where others cannot be
            refused, their logits are NaN. Padding may hold anything.
          cache: from `init_cache` or an earlier call. A whole prompt, a piece of it and a single token are the same
            call. Key/value caches must have room for T more tokens; rows that overflow are NaN.
          segment_ids: [B, T]; a maximal run of equal ids is a document, and nothing crosses its edge.
          lengths: [B], at most T: the tokens that count in right-padded rows; the others enter no cache.
          cache_is_empty: promises that the cache is as `init_cache` makes it, which lets a prompt be read by the
            fastest form and implementation there is.
          last_only: whether to return the logits of each row's last token only; of a long prompt all are many.
          apply_head: whether to return logits, and not what the head makes them of, for a loss that makes them piece
            by piece with `head_logits` and `head_kernel`.

        Returns:
          logits [B, N, vocab], N = T, or 1 where it is `last_only`; without the head, the normalised hidden states
          [B, N, E] in `execution.dtype`; with `cache`, (logits, cache).

        Raises:
          ValueError: tokens, segment_ids or lengths that are not integers of these shapes; tokens out of the vocabulary
            and lengths out of range, where their values are known; a cache of another model.
        """
        config, execution = self.config, self.execution
        tokens, segment_ids, lengths = as_tokens(tokens, config.vocab_size, segment_ids, lengths)
        cache = jax.tree.map(jnp.asarray, cache)
        if lengths is not None:
            # Padding may hold what is no token, whose embedding is NaN: 0 times that is in the gradients of weights.
            tokens = jnp.where(valid_tokens(lengths, tokens.shape[1]), tokens, 0)

        start = jnp.zeros(tokens.shape[:1], jnp.int32) if cache is None else cache.position
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        table = nn.Embed(
            config.vocab_size,
            config.d_model,
            param_dtype=execution.param_dtype,
            embedding_init=with_logical_axes(PROJECTION_INIT, ("vocab", "embed")),
            name="embedding",
        ).embedding
        # Whole rows before the lookup: from rows that are cut over `embed`, XLA comes to an x that is cut over the
        # batch only by way of the whole batch's x on every device.
        # Looked up in float32 or wider, so that the gradients of a token's rows are added up in it: in bfloat16 the sum
        # over a frequent token stands still, and on an H100 took XLA 11 % of a training step, a hundred times as long.
        wide = whole_rows(table, execution.dtype).astype(accumulation_dtype(table.dtype))
        # What is no token is NaN, where it could not be refused; a negative one would else count from the end.
        x = wide.at[tokens].get(mode="fill", wrap_negative_indices=False).astype(execution.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))

        one_by_one = execution.scan_layers is False
        block = REMATS[execution.remat](Block, prevent_cse=one_by_one)
        caches = []
        for index, (mixer, count) in enumerate(config.layer_runs):
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, *[nn.broadcast] * 4),
                length=count,
                unroll=count if one_by_one else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(
                config=config,
                mixer=mixer,
                execution=execution,
                cache_is_empty=cache_is_empty,
                name=f"layers_{index}",
            )
            rows = segment_ids, lengths, positions
            if cache is None:
                x, _ = layers(x, None, np.arange(count), None, *rows)
                continue
            before, stack = detach(cache.layers[index])
            x, new = layers(x, before, np.arange(count), stack, *rows)
            caches.append(write(mixer, cache.layers[index], new, execution))

        norm = RMSNorm(eps=config.norm_eps, dtype=execution.dtype, param_dtype=execution.param_dtype, name="norm")
        counts = jnp.full(start.shape, tokens.shape[1], jnp.int32) if lengths is None else lengths
        if last_only:
            x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
        out = self._logits(norm(x), table) if apply_head else norm(x)
        if cache is None:
            return out
        return poison_rollback(out, cache), advance(cache, tuple(caches), counts)

    def _logits(self, x: AnyArray, embedding: AnyArray) -> jax.Array:
        """The head, a parameter of its own unless it is tied to the embedding [vocab, E]."""
        if self.config.tie_embeddings:
            kernel = embedding.T
        else:
            init = with_logical_axes(PROJECTION_INIT, ("embed", "vocab"))
            shape = (self.config.d_model, self.config.vocab_size)
            kernel = self.param("head", init, shape, self.execution.param_dtype)
        return nn.with_logical_constraint(head_logits(x, kernel), ("batch", "length", "vocab"))


def head_kernel(params) -> Float[Array, "E vocab"]:
    """W of `head_logits` from the parameters of a `LanguageModel`: its own, or the transposed embedding where tied.

    Examples:
      >>> head_kernel(params).shape
      (8, 16)
    """
    return nn.unbox(params["head"]) if "head" in params else nn.unbox(params["embedding"]["embedding"]).T


def head_logits(x: Float[AnyArray, "... E"], kernel: Float[AnyArray, "E vocab"]) -> Float[Array, "... vocab"]:
    """x W, the product in x's dtype, summed and kept in float32 or wider.

    Examples:
      >>> x = jnp.ones((1, 2, 8))  # such as some tokens of `model.apply(..., apply_head=False)`
      >>> head_logits(x, head_kernel(params)).shape
      (1, 2, 16)
    """
    return jnp.einsum("...e,ev->...v", x, kernel.astype(x.dtype), preferred_element_type=accumulation_dtype(x.dtype))


def whole_rows(table: Float[AnyArray, "vocab E"], dtype: jax.typing.DTypeLike) -> Float[AnyArray, "vocab E"]:
    """The table with all of each row on every device that has some of it.

    Where devices must pass parts of rows on to each other, these are rounded to `dtype` first, in which the rows are
    used, if that is narrower; the gradients that come back are not.
    """
    (axes,) = nn.logical_to_mesh_axes(("embed",))
    if devices_of(axes) == 1 or jnp.dtype(dtype).itemsize >= table.dtype.itemsize:
        return nn.with_logical_constraint(table, ("vocab", None))
    return _rounded_whole_rows(table, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded_whole_rows(table, dtype):
    return nn.with_logical_constraint(table.astype(dtype), ("vocab", None)).astype(table.dtype)


def _rounded_whole_rows_forward(table, dtype):
    return _rounded_whole_rows(table, dtype), None


def _rounded_whole_rows_backward(dtype, _, cotangent):
    return (cotangent,)


_rounded_whole_rows.defvjp(_rounded_whole_rows_forward, _rounded_whole_rows_backward)
