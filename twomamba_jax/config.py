"""What a model computes: frozen, validated descriptions. How it is computed is `layers.Execution`."""

import dataclasses
import math
import numbers
from typing import Literal, get_args

from twomamba_jax.ops.decay import Decay
from twomamba_jax.ops.integers import checked_integer
from twomamba_jax.ops.score import SCORES, Score

Norm = Literal["softmax", "output"]
Activation = Literal["none", "relu", "silu"]
ActivationOn = Literal["qk", "qkv"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """One token mixer of the paper's family.

    Attributes:
      score: `linear`, `squared` or `exp`, of `decay_attention`.
      norm: `softmax` divides each row by the sum of its weights, `output` takes an RMSNorm of the output over all
        heads together.
      activation: of queries and keys after the convolution.
      activation_on: `qk`, or `qkv` to activate the values too (Mamba-2).
      conv_width: window of the causal convolution over q, k and v, 1 (none) to 4.
      decay: `none`; `discretized`, a = -exp(A_log) dt; `softplus`, a = -softplus(h W_A); or `memoryless`, where a token
        sees itself alone, which cuts the mixing and leaves everything else.
      discretize_values: v dt in place of v, with dt = softplus(h W_dt + dt_bias).
      dt_bias: whether dt has its bias.
      d_residual: adds D v to the output.
      z_gate: multiplies the output by silu(z), z a projection of the input.
      rope: rotary position embedding of q and k.
      scale: factor on `<q, k>`; None is 1 / sqrt(K).
      qk_dim: K, the size of queries and keys; None is the model's head_dim, which is that of the values. A squared
        score's state has K (K + 1) / 2 x V numbers.
      half_lives: (shortest, longest) in tokens, of a learned bias per key/value head in the softplus decay,
        a = -softplus(h W_A + b): at first, where h W_A is near 0, the heads forget half in times spread geometrically
        from one to the other. None: no bias, and a half-life of one token.
      normalize_keys: each head's keys divided by their root mean square, after the activation. A scale of its channels
        would be one of the queries' too, and queries cancel in a squared score that is normalised: neither is there.
      qk_groups: N, the sets of queries and keys (state-spaces' ngroups). Head h of H has those of set h // (H // N),
        and values and a decay of its own. None: each head has queries of its own.
      conv_bias: whether the convolution has its bias.
      z_bias: whether the projection z has its bias.
      d_per_head: D is one number a head, not one for each of its channels.
      norm_groups: sets of neighbouring heads that the output norm takes apart, each divided by its own root mean
        square.

    Raises:
      ValueError: an unknown value, or a combination that defines no model.

    Examples:
      >>> mixer = MixerConfig(score="squared", norm="softmax", conv_width=2, decay="softplus")
      >>> mixer == VARIANTS["2mamba"].mixer
      True
    """

    score: Score
    norm: Norm
    activation: Activation = "none"
    activation_on: ActivationOn = "qk"
    conv_width: int = 1
    decay: Decay = "none"
    discretize_values: bool = False
    dt_bias: bool = False
    d_residual: bool = False
    z_gate: bool = False
    rope: bool = False
    scale: float | None = None
    qk_dim: int | None = None
    half_lives: tuple[float, float] | None = None
    normalize_keys: bool = False
    qk_groups: int | None = None
    conv_bias: bool = True
    z_bias: bool = True
    d_per_head: bool = False
    norm_groups: int = 1

    def __post_init__(self):
        for name, kind in (
            ("score", Score),
            ("norm", Norm),
            ("activation", Activation),
            ("activation_on", ActivationOn),
            ("decay", Decay),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: expected one of {_listed(get_args(kind))}"
                )
        if type(self.conv_width) is not int or self.conv_width not in (1, 2, 3, 4):
            raise ValueError(f"conv_width={self.conv_width!r} must be 1 (no convolution), 2, 3 or 4")
        if self.scale is not None and not (isinstance(self.scale, numbers.Real) and 0 < self.scale < math.inf):
            raise ValueError(f"scale={self.scale!r} must be a positive number, or None for 1 / sqrt(K)")
        object.__setattr__(self, "qk_dim", checked_integer("qk_dim", self.qk_dim, or_none=True))
        if self.qk_dim is not None and self.rope and self.qk_dim % 2:
            raise ValueError(f"qk_dim={self.qk_dim} must be even: rotary embeddings turn pairs")
        if self.half_lives is not None:
            self._check_half_lives()
        finite = SCORES[self.score].finite
        if finite is None and self.norm == "output":
            raise ValueError(
                f"score={self.score!r} with norm='output' is undefined: its weights overflow unnormalised; use "
                "norm='softmax'"
            )
        if finite and finite.has_sign and self.norm == "softmax" and (self.activation != "relu" or self.rope):
            raise ValueError(
                f"score={self.score!r} with norm='softmax' divides by a sum of scores, which must not be negative: use "
                "activation='relu' and rope=False, or norm='output'"
            )
        if self.activation_on == "qkv" and self.activation == "none":
            raise ValueError("activation_on='qkv' needs an activation: activation='none' has nothing to apply")
        if self.dt_bias and not self.uses_step_size:
            raise ValueError("dt_bias=True needs a dt: set discretize_values=True or decay='discretized'")
        self._check_parts()

    def _check_parts(self):
        """What says how a part of the mixer is made needs that part."""
        object.__setattr__(self, "qk_groups", checked_integer("qk_groups", self.qk_groups, or_none=True))
        object.__setattr__(self, "norm_groups", checked_integer("norm_groups", self.norm_groups))
        for name in ("conv_bias", "z_bias", "d_per_head"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if not self.conv_bias and self.conv_width == 1:
            raise ValueError("conv_bias=False needs a convolution: set conv_width=2, 3 or 4, or omit it")
        if not self.z_bias and not self.z_gate:
            raise ValueError("z_bias=False needs a gate: set z_gate=True, or omit it")
        if self.d_per_head and not self.d_residual:
            raise ValueError("d_per_head=True needs a D: set d_residual=True")
        if self.norm_groups > 1 and self.norm != "output":
            raise ValueError(f"norm_groups={self.norm_groups} are the output norm's, and this is norm={self.norm!r}")

    def _check_half_lives(self):
        if self.decay != "softplus":
            raise ValueError(f"half_lives are the softplus decay's, and this is decay={self.decay!r}: omit them")
        half_lives = tuple(self.half_lives)  # hashable, whatever sequence was given
        object.__setattr__(self, "half_lives", half_lives)
        if len(half_lives) != 2 or not 0 < half_lives[0] <= half_lives[1] < math.inf:
            raise ValueError(f"half_lives={half_lives!r} must be (shortest, longest), positive numbers of tokens")

    def check_heads(self, num_heads: int, kv_heads: int) -> None:
        """Raises ValueError where H = `num_heads` and G = `kv_heads` do not go with its groups."""
        if self.qk_groups is not None and kv_heads != num_heads:
            raise ValueError(
                f"qk_groups={self.qk_groups} shares queries and keys between heads that have values of their own, and "
                f"num_kv_heads={kv_heads} shares values too: omit one of the two"
            )
        for name in ("qk_groups", "norm_groups"):
            if num_heads % (getattr(self, name) or 1):
                raise ValueError(f"num_heads={num_heads} must be a multiple of {name}={getattr(self, name)}")

    @property
    def uses_step_size(self) -> bool:
        """Whether the mixer has a discretisation step dt."""
        return self.discretize_values or self.decay == "discretized"

    @property
    def normalize(self) -> bool:
        """Whether rows are divided by the sum of their weights."""
        return self.norm == "softmax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model in the shape of Llama 2, with a mixer per layer (Appendix B).

    Attributes:
      vocab_size: tokens.
      d_model: width of the residual stream.
      num_layers: blocks of a mixer and an MLP.
      num_heads: query heads, H.
      head_dim: V, and K where a mixer has no `qk_dim` of its own.
      mlp_dim: hidden width of the SwiGLU MLP; 0 makes blocks of a mixer alone.
      mixers: one `MixerConfig` for all layers, or one a layer. Equal neighbours are scanned as one.
      num_kv_heads: key/value heads, G; None is `num_heads`.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      output_norm_eps: epsilon of the mixers' output norm; None is `norm_eps`.
      tie_embeddings: whether the head is the transpose of the embedding, and no parameter of its own.

    Raises:
      ValueError: a size below its least, heads that do not divide or do not go with a mixer's groups, a number of
        mixers that is not the number of layers, an odd head_dim with rotary embeddings.

    Examples:
      >>> config = ModelConfig(
      ...     vocab_size=16,
      ...     d_model=8,
      ...     num_layers=2,
      ...     num_heads=2,
      ...     head_dim=4,
      ...     mlp_dim=16,
      ...     mixers=VARIANTS["2mamba"].mixer,
      ... )
      >>> config.kv_heads, len(config.layer_mixers)
      (2, 2)
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    mixers: MixerConfig | tuple[MixerConfig, ...]
    num_kv_heads: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    output_norm_eps: float | None = None
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "head_dim", "mlp_dim", "num_kv_heads"):
            least = 0 if name == "mlp_dim" else 1
            value = checked_integer(name, getattr(self, name), or_none=name == "num_kv_heads", least=least)
            object.__setattr__(self, name, value)
        if not isinstance(self.mixers, MixerConfig):
            object.__setattr__(self, "mixers", tuple(self.mixers))  # hashable, whatever sequence was given
            if not all(isinstance(mixer, MixerConfig) for mixer in self.mixers):
                raise ValueError(
                    f"mixers={self.mixers!r} must be a MixerConfig or one a layer: VARIANTS[name].mixer, or "
                    "parse_pattern(pattern, num_layers)"
                )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if len(self.layer_mixers) != self.num_layers:
            raise ValueError(
                f"{len(self.layer_mixers)} mixers given for num_layers={self.num_layers}: give one, or one each"
            )
        for mixer in set(self.layer_mixers):
            mixer.check_heads(self.num_heads, self.kv_heads)
        if self.tie_embeddings not in (True, False):
            raise ValueError(f"tie_embeddings={self.tie_embeddings!r} must be True or False")
        if self.head_dim % 2 and any(mixer.rope and mixer.qk_dim is None for mixer in self.layer_mixers):
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        if not 0 < self.norm_eps < math.inf or not 0 < self.rope_theta < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must be positive and finite")
        if self.output_norm_eps is not None and not 0 < self.output_norm_eps < math.inf:
            raise ValueError(
                f"output_norm_eps={self.output_norm_eps} must be positive and finite, or None for norm_eps"
            )

    @property
    def kv_heads(self) -> int:
        """G, the key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def layer_mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of each layer."""
        return (self.mixers,) * self.num_layers if isinstance(self.mixers, MixerConfig) else self.mixers

    @property
    def layer_runs(self) -> tuple[tuple[MixerConfig, int], ...]:
        """(mixer, count) for each maximal run of layers with equal mixers: what the model scans over."""
        runs: list[tuple[MixerConfig, int]] = []
        for mixer in self.layer_mixers:
            if runs and runs[-1][0] == mixer:
                runs[-1] = (mixer, runs[-1][1] + 1)
            else:
                runs.append((mixer, 1))
        return tuple(runs)


def _listed(values) -> str:
    return ", ".join(map(repr, values))
