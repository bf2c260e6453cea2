"""2Mamba in JAX and Flax: attention that costs linear time and matches softmax (arXiv 2602.17363)."""

from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.generation import Generation, generate
from twomamba_jax.layers import (
    Cache,
    Execution,
    LanguageModel,
    Mixer,
    MixerCache,
    RMSNorm,
    SwiGLU,
    cache_bytes,
    init_cache,
    roll_back,
)
from twomamba_jax.ops.convolution import causal_convolution
from twomamba_jax.ops.decay_attention import decay_attention, decay_attention_step
from twomamba_jax.ops.state import FiniteState, KeyValueCache, init_state, state_bytes
from twomamba_jax.variants import VARIANTS, Variant, parse_pattern

__all__ = [
    "VARIANTS",
    "Cache",
    "Execution",
    "FiniteState",
    "Generation",
    "KeyValueCache",
    "LanguageModel",
    "Mixer",
    "MixerCache",
    "MixerConfig",
    "ModelConfig",
    "RMSNorm",
    "SwiGLU",
    "Variant",
    "cache_bytes",
    "causal_convolution",
    "decay_attention",
    "decay_attention_step",
    "generate",
    "init_cache",
    "init_state",
    "parse_pattern",
    "roll_back",
    "state_bytes",
]
