"""The token mixer: every variant of the paper, by its config alone."""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.config import MixerConfig
from twomamba_jax.layers.cache import ConvolutionInputs, MixerCache, write
from twomamba_jax.layers.execution import Execution
from twomamba_jax.layers.norm import RMSNorm
from twomamba_jax.layers.partitioning import with_logical_axes
from twomamba_jax.layers.projection import Projection, joint_kernel, product, uniform
from twomamba_jax.ops.checks import as_arrays, as_rows
from twomamba_jax.ops.convolution import causal_convolution
from twomamba_jax.ops.decay import STRONGEST_LOG_DECAY, discretized_decay, softplus_decay, step_size
from twomamba_jax.ops.decay_attention import decay_attention
from twomamba_jax.ops.decoding import cached_attention
from twomamba_jax.ops.joint_convolution import can_convolve, joint_convolution
from twomamba_jax.ops.kept import kept
from twomamba_jax.ops.layout import repeat_heads
from twomamba_jax.ops.norm import divide_by_rms
from twomamba_jax.ops.numerics import accumulation_dtype, broadcast_parameter
from twomamba_jax.ops.rope import apply_rope
from twomamba_jax.ops.segments import valid_tokens
from twomamba_jax.shapes import AnyArray, Array, Float, Int, Lengths, SegmentIds


class Copies(NamedTuple):
    """A mixer's input again, for its product of this name: `RMSNorm` adds up the gradients of all in one pass."""

    k: Float[Array, "B T E"]
    v: Float[Array, "B T E"]
    per_head: Float[Array, "B T E"]


class Mixer(nn.Module):
    """projection -> convolution -> activation -> decay attention -> D residual -> gate -> norm -> projection.

    Which of these it has, and with what score, decay and norm, is `config`'s to say (Algorithms 2 to 5).

    Attributes:
      config: what to compute.
      num_heads: H.
      head_dim: V, and K where `config` has no `qk_dim`.
      num_kv_heads: G; None is H.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of the output norm, and of normalised keys.
      execution: how to compute it.
      output_norm_eps: epsilon of the output norm; None is `norm_eps`.

    Examples:
      >>> mixer = Mixer(VARIANTS["2mamba"].mixer, num_heads=2, head_dim=4)
      >>> x = jnp.ones((1, 5, 8))
      >>> (y, cache), variables = jax.jit(mixer.init_with_output)(jax.random.key(0), x)
      >>> y.shape, cache is None
      ((1, 5, 8), True)
    """

    config: MixerConfig
    _: dataclasses.KW_ONLY
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    execution: Execution = Execution()
    output_norm_eps: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "B T E"],
        *,
        copies: Copies | None = None,
        segment_ids: SegmentIds | None = None,
        lengths: Lengths | None = None,
        positions: Int[AnyArray, "B T"] | None = None,
        cache: MixerCache | None = None,
        cache_is_empty: bool = False,
        layer: Int[Array, ""] | None = None,
        writes: bool = True,
    ) -> tuple[Float[Array, "B T E"], MixerCache | None]:
        """Mixes the tokens of x.

        Args:
          x: [B, T, E].
          copies: of x, as `RMSNorm` makes them; None: there are none.
          segment_ids: [B, T]; nothing crosses the edge of a segment.
          lengths: [B], the tokens that count in right-padded rows.
          positions: [B, T], for rotary embeddings; None: 0, 1, ...
          cache: what the tokens before left behind; None: there were none, and none is returned.
          cache_is_empty: promises that the cache is as `init_mixer_cache` makes it, which lets a prompt be read by any
            form and implementation.
          layer: which layer's it is where `cache.attention` is a stack of those of all layers, which is read where it
            lies; None: it is this layer's alone. With it, `writes` is False.
          writes: False returns what the tokens leave behind, a `MixerCache` of `NewTokens`, instead of the cache with
            it, for the caller to `write` (`LanguageModel` writes to all its layers together).

        Returns:
          y [B, T, E], and the cache after the last token (None without `cache`).

        Raises:
          ValueError: `layer` with `writes`.
        """
        if layer is not None and writes:
            raise ValueError(
                "layer= names one of a stack of all layers' caches: pass writes=False, and write to the stack"
            )
        x, positions = as_arrays(x, positions)
        segment_ids, lengths = as_rows(x.shape, segment_ids, lengths)
        cache = jax.tree.map(jnp.asarray, cache)
        if lengths is not None:
            # Padding may hold NaN, and 0 times that would be in the gradients of the projections' weights.
            x, copies = jax.tree.map(
                lambda x: jnp.where(valid_tokens(lengths, x.shape[1])[..., None], x, 0), (x, copies)
            )
        copies = copies or Copies(x, x, x)
        config, kv_heads = self.config, self.num_kv_heads or self.num_heads
        config.check_heads(self.num_heads, kv_heads)
        dtype, wide = self.execution.dtype, accumulation_dtype(self.execution.dtype)

        rows = {"segment_ids": segment_ids, "lengths": lengths}
        q, k, v, convolution = self._convolved_together(x, cache, **rows) or self._convolved(x, copies, cache, **rows)
        if config.activation_on == "qkv":
            v = self._activate(v)
        residual = self._residual(v) if config.d_residual else None
        numbers = self._per_head(copies.per_head, cache, kv_heads, wide)
        dt = self._step_size(numbers["dt"]) if config.uses_step_size else None
        log_decay = self._log_decay(numbers, dt, (*x.shape[:2], kv_heads), wide)
        if config.discretize_values:
            v = (v * dt[..., None]).astype(dtype)
        q, k = self._activate(q), self._activate(k)
        if config.normalize_keys:
            k = divide_by_rms(k, 1, self.norm_eps).astype(dtype)
        if config.rope:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
            q, k = (apply_rope(y, positions, self.rope_theta) for y in (q, k))
            if config.conv_width == 1 and config.activation == "none" and not config.normalize_keys:
                # In the place of the products that q and k were, which the gradient of a rotation does not need.
                q, k = kept(q), kept(k)
        if config.qk_groups is not None:
            q, k = self._of_all_heads(q, "heads"), self._of_all_heads(k, "kv_heads")

        if cache is None:
            y = decay_attention(q, k, v, log_decay, **rows, **self._operation("length"))
        else:
            # A cache is not sharded along its tokens, and the new ones are too few to be.
            options = self._operation(None) | {"is_empty": cache_is_empty, "layer": layer}
            y, new = cached_attention.read(q, k, v, log_decay, cache.attention, **rows, **options)
            new = MixerCache(new, convolution)
            cache = write(config, cache, new, self.execution) if writes else new

        if residual is not None:
            y = y + residual
        if config.z_gate:
            y = y * nn.silu(self._project("z", x, self.num_heads, "heads", self.head_dim, config.z_bias))
        if config.norm == "output":
            eps = self.norm_eps if self.output_norm_eps is None else self.output_norm_eps
            options = {"eps": eps, "groups": config.norm_groups, **self._dtypes()}
            y = RMSNorm(("heads", "head_dim"), name="norm", **options)(y)
        y = nn.with_logical_constraint(y, ("batch", "length", "heads", "head_dim"))
        out = Projection(("heads", "head_dim"), ("embed",), x.shape[-1:], name="out", **self._dtypes())
        return out(y), cache

    def _convolved(self, x, copies, cache, **rows):
        """Queries, keys and values after their convolutions, and the inputs that the next tokens' take, or None."""
        config, kv_heads = self.config, self.num_kv_heads or self.num_heads
        qk_dim = config.qk_dim or self.head_dim
        q_heads, q_axis = (self.num_heads, "heads") if config.qk_groups is None else (config.qk_groups, "qk_groups")
        k_heads, k_axis = (kv_heads, "kv_heads") if config.qk_groups is None else (config.qk_groups, "qk_groups")
        q = self._project("q", x, q_heads, q_axis, qk_dim)
        k = self._project("k", copies.k, k_heads, k_axis, qk_dim)
        v = self._project("v", copies.v, kv_heads, "kv_heads", self.head_dim)

        if cache is not None and (cache.convolution is None) != (config.conv_width == 1):
            raise ValueError(
                f"the cache is of a mixer {'without' if cache.convolution is None else 'with'} a convolution"
            )
        if config.conv_width == 1:
            return q, k, v, None
        before = ConvolutionInputs(None, None, None) if cache is None else cache.convolution
        q, q_inputs = self._convolve("q", q, q_axis, before.q, **rows)
        k, k_inputs = self._convolve("k", k, k_axis, before.k, **rows)
        v, v_inputs = self._convolve("v", v, "kv_heads", before.v, **rows)
        return q, k, v, ConvolutionInputs(q_inputs, k_inputs, v_inputs)

    def _convolved_together(self, x, cache, segment_ids, lengths):
        """The same where one product can make all three and a kernel their gradient, or None."""
        config, dtype, (heads, size) = self.config, self.execution.dtype, (self.num_heads, self.head_dim)
        alike = config.qk_groups is None and (config.qk_dim or size) == size and (self.num_kv_heads or heads) == heads
        if not alike or config.conv_width == 1 or cache is not None or lengths is not None or self.is_initializing():
            return None
        elementwise = self.execution.elementwise("heads")
        shape = 3, heads, size
        array = jax.ShapeDtypeStruct((*x.shape[:2], *shape), dtype)
        if not can_convolve(array, jax.ShapeDtypeStruct((config.conv_width, *shape), dtype), elementwise):
            return None
        names = "q", "k", "v"
        kernel = joint_kernel([self._projection(name, "heads", (heads, size)) for name in names], x.shape[-1:])
        qkv = product(x.astype(dtype), kernel, 1)
        qkv = nn.with_logical_constraint(qkv, ("batch", "length", None, "heads", "head_dim"))
        taps, biases = zip(*(self._taps(name, "heads", (heads, size)) for name in names))
        bias = jnp.stack(biases) if config.conv_bias else None
        return *joint_convolution(qkv, jnp.stack(taps, 1), bias, segment_ids, elementwise), None

    def _operation(self, length):
        """What the operation computes, and how; `length` is the logical axis of its tokens."""
        config, execution = self.config, self.execution
        axes = nn.logical_to_mesh_axes(("batch", length, "heads", "head_dim"))
        return {
            "score": config.score,
            "normalize": config.normalize,
            "scale": config.scale,
            "form": execution.form,
            "chunk_size": execution.chunk_size,
            "implementation": execution.implementation,
            "precision": execution.precision,
            # The example that parameters are made for need not divide by a mesh.
            "partition": None if self.is_initializing() else axes,
        }

    def _project(self, name, x, heads, axis, size, use_bias=False):
        y = self._projection(name, axis, (heads, size), use_bias)(x)
        return nn.with_logical_constraint(y, ("batch", "length", axis, "head_dim"))

    def _projection(self, name, axis, dims, use_bias=False):
        return Projection(("embed",), (axis, "head_dim"), dims, use_bias=use_bias, name=name, **self._dtypes())

    def _convolve(self, name, x, axis, initial_inputs, **rows):
        kernel, bias = self._taps(name, axis, x.shape[2:])
        return causal_convolution(x, kernel, bias, initial_inputs=initial_inputs, **rows)

    def _taps(self, name, axis, shape):
        """The kernel of a convolution, and its bias or None."""
        width = self.config.conv_width
        init = uniform(width)
        kernel = self._param(f"conv_{name}_kernel", init, ("conv", axis, "head_dim"), (width, *shape))
        if not self.config.conv_bias:
            return kernel, None
        return kernel, self._param(f"conv_{name}_bias", init, (axis, "head_dim"), shape)

    def _of_all_heads(self, x, axis):
        """q or k [B, T, groups, K] as every head has it: copies, which the forms and the kernels take."""
        x = repeat_heads(x, self.num_heads)
        return nn.with_logical_constraint(x, ("batch", "length", axis, "head_dim"))

    def _activate(self, x):
        return {"none": lambda x: x, "relu": nn.relu, "silu": nn.silu}[self.config.activation](x)

    def _residual(self, v):
        """D * v, for every query head."""
        axes, shape = ("heads", "head_dim"), (self.num_heads, self.head_dim)
        if self.config.d_per_head:
            weight = self._param("D", nn.initializers.ones, axes[:1], shape[:1])[:, None]
        else:
            weight = self._param("D", nn.initializers.ones, axes, shape)
        v = jnp.repeat(v, self.num_heads // v.shape[2], axis=2)
        return v * broadcast_parameter(weight, v.shape, v.dtype)

    def _per_head(self, x, cache, heads, wide):
        """Projections [B, T, G] to one number per key/value head, by name: two are one product of x, without a cache.

        They are in float32 or wider, since decays are sums of them.
        """
        needed = {"dt": self.config.uses_step_size, "decay": self.config.decay == "softplus"}
        of_heads = {"dtype": wide, "param_dtype": self.execution.param_dtype}
        projections = [
            Projection(("embed",), ("kv_heads",), (heads,), name=name, **of_heads) for name in needed if needed[name]
        ]
        if len(projections) < 2 or cache is not None or self.is_initializing():
            return {projection.name: projection(x) for projection in projections}
        both = product(x.astype(wide), joint_kernel(projections, x.shape[-1:]), 1)
        both = nn.with_logical_constraint(both, ("batch", "length", None, "kv_heads"))
        return {projection.name: both[:, :, i] for i, projection in enumerate(projections)}

    def _step_size(self, dt):
        bias = self._param("dt_bias", _dt_bias_init, ("kv_heads",), dt.shape[2:]) if self.config.dt_bias else None
        return step_size(dt, bias)

    def _log_decay(self, numbers, dt, shape, wide):
        dims = shape[2:]
        match self.config.decay:
            case "none":
                return None
            case "memoryless":
                return jnp.full(shape, STRONGEST_LOG_DECAY, wide)
            case "softplus":
                bias = None
                if self.config.half_lives is not None:
                    bias = self._param("decay_bias", _half_life_bias(*self.config.half_lives), ("kv_heads",), dims)
                return softplus_decay(numbers["decay"], bias)
            case "discretized":
                return discretized_decay(self._param("A_log", _a_log_init, ("kv_heads",), dims), dt)

    def _dtypes(self):
        return {"dtype": self.execution.dtype, "param_dtype": self.execution.param_dtype}

    def _param(self, name, init, axes, shape):
        return self.param(name, with_logical_axes(init, axes), shape, self.execution.param_dtype)


def _half_life_bias(shortest, longest):
    """b with softplus(b) = log(2) / h, of half-lives h spread geometrically over the heads; one head has their mean."""

    def init(key, shape, dtype):
        (heads,) = shape
        half_lives = np.geomspace(shortest, longest, heads) if heads > 1 else np.sqrt([shortest * longest])
        return jnp.asarray(np.log(np.expm1(math.log(2) / half_lives)), dtype)

    return init


def _a_log_init(key, shape, dtype):
    """log U[1, 16] (Algorithm 2)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def _dt_bias_init(key, shape, dtype):
    """The inverse softplus of exp(U[log 1e-3, log 1e-1]) (Algorithm 2)."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))
