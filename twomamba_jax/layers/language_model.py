"""A causal language model: embedding, blocks of a mixer and an MLP, head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.layers.cache import Cache
from twomamba_jax.layers.execution import Execution
from twomamba_jax.layers.mixer import Mixer
from twomamba_jax.layers.mlp import PROJECTION_INIT, SwiGLU
from twomamba_jax.layers.norm import RMSNorm
from twomamba_jax.ops.checks import check_rows
from twomamba_jax.ops.numerics import accumulation_dtype
from twomamba_jax.shapes import Array, Float, Lengths, SegmentIds, Tokens


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Attributes:
      config: the model's.
      mixer: this layer's.
      execution: how to compute it.
    """

    config: ModelConfig
    mixer: MixerConfig
    execution: Execution

    @nn.compact
    def __call__(self, x, cache, segment_ids, lengths, positions):
        """x [B, T, E] and a `MixerCache` or None; returns the same."""
        config, dtype, param_dtype = self.config, self.execution.dtype, self.execution.param_dtype
        norm = {"eps": config.norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        mixed, cache = Mixer(
            self.mixer,
            config.num_heads,
            config.head_dim,
            config.kv_heads,
            config.rope_theta,
            config.norm_eps,
            self.execution,
            name="mixer",
        )(
            RMSNorm(name="mixer_norm", **norm)(x),
            segment_ids=segment_ids,
            lengths=lengths,
            positions=positions,
            cache=cache,
        )
        x = nn.with_logical_constraint(x + mixed, ("batch", "length", "embed"))
        x = x + SwiGLU(config.mlp_dim, dtype, param_dtype, name="mlp")(RMSNorm(name="mlp_norm", **norm)(x))
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), cache


class LanguageModel(nn.Module):
    """The Llama-2 shape of Appendix B with a mixer of the 2Mamba family in each layer.

    Each run of layers with equal mixers is one `nn.scan`: its parameters carry a leading `layers` axis, and compilation
    time does not grow with depth.

    Attributes:
      config: what to compute.
      execution: how to compute it.
    """

    config: ModelConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        cache: Cache | None = None,
        segment_ids: SegmentIds | None = None,
        lengths: Lengths | None = None,
    ) -> Float[Array, "B T vocab"] | tuple[Float[Array, "B T vocab"], Cache]:
        """Logits of the token after each one, float32 or wider.

        Args:
          tokens: [B, T] integers from 0 to `vocab_size` - 1 (values are not checked), any T >= 1.
          cache: from `init_cache` or an earlier call. A whole prompt, a piece of it and a single token are the same
            call. Key/value caches must have room for T more tokens; rows that overflow are NaN.
          segment_ids: [B, T]; a maximal run of equal ids is a document, and nothing crosses its edge.
          lengths: [B], at most T: the tokens that count in right-padded rows; the others enter no cache.

        Returns:
          logits [B, T, vocab]; with `cache`, (logits, cache).

        Raises:
          ValueError: tokens, segment_ids or lengths that are not integers of these shapes; a cache of another model.
        """
        config, execution = self.config, self.execution
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be integers [B, T] with T >= 1, got {tokens.dtype} {tokens.shape}")

        check_rows(tokens, segment_ids, lengths)

        start = jnp.zeros(tokens.shape[:1], jnp.int32) if cache is None else cache.position
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        x = nn.Embed(
            config.vocab_size,
            config.d_model,
            dtype=execution.dtype,
            param_dtype=execution.param_dtype,
            embedding_init=nn.with_logical_partitioning(PROJECTION_INIT, ("vocab", "embed")),
            name="embedding",
        )(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))

        block = nn.remat(Block, prevent_cse=False) if execution.remat else Block
        caches = []
        for index, (mixer, count) in enumerate(config.runs):
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=count,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config, mixer, execution, name=f"layers_{index}")
            before = None if cache is None else cache.layers[index]
            x, after = layers(x, before, segment_ids, lengths, positions)
            caches.append(after)

        norm = RMSNorm(eps=config.norm_eps, dtype=execution.dtype, param_dtype=execution.param_dtype, name="norm")
        logits = self._logits(norm(x))
        if cache is None:
            return logits
        counts = tokens.shape[1] if lengths is None else lengths.astype(jnp.int32)
        return logits, Cache(tuple(caches), start + counts)

    def _logits(self, x: jax.Array) -> jax.Array:
        """The untied head, summed and kept in float32 or wider."""
        init = nn.with_logical_partitioning(PROJECTION_INIT, ("embed", "vocab"))
        shape = (self.config.d_model, self.config.vocab_size)
        kernel = self.param("head", init, shape, self.execution.param_dtype).astype(x.dtype)
        logits = jnp.einsum("bte,ev->btv", x, kernel, preferred_element_type=accumulation_dtype(x.dtype))
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))
