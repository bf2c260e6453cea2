"""2Mamba in JAX and Flax: attention that costs linear time and matches softmax (arXiv 2602.17363)."""

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.generation import Decoding, Generation, decode, fork, generate, prefill, seed
from twomamba_jax.layers import (
    Cache,
    Execution,
    LanguageModel,
    Mixer,
    MixerCache,
    RMSNorm,
    SwiGLU,
    cache_bytes,
    head_kernel,
    head_logits,
    init_cache,
    roll_back,
)
from twomamba_jax.ops.convolution import causal_convolution
from twomamba_jax.ops.decay_attention import decay_attention, decay_attention_step
from twomamba_jax.ops.decoding.cached_attention import cached_attention, init_decoding_cache
from twomamba_jax.ops.dispatch import Form, Implementation
from twomamba_jax.ops.numerics import Precision
from twomamba_jax.ops.score import Score
from twomamba_jax.ops.state import FiniteState, KeyValueCache, init_state, state_bytes
from twomamba_jax.sampling import Sampling
from twomamba_jax.variants import VARIANTS, Variant, parse_pattern

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Cache",
    "Decoding",
    "Execution",
    "FiniteState",
    "Form",
    "Generation",
    "Implementation",
    "KeyValueCache",
    "LanguageModel",
    "Mixer",
    "MixerCache",
    "MixerConfig",
    "ModelConfig",
    "Precision",
    "RMSNorm",
    "Sampling",
    "Score",
    "SwiGLU",
    "Variant",
    "__version__",
    "cache_bytes",
    "cached_attention",
    "causal_convolution",
    "decay_attention",
    "decay_attention_step",
    "decode",
    "fork",
    "generate",
    "head_kernel",
    "head_logits",
    "init_cache",
    "init_decoding_cache",
    "init_state",
    "parse_pattern",
    "prefill",
    "roll_back",
    "seed",
    "state_bytes",
]
