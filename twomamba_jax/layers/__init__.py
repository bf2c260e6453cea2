"""Flax linen modules over `twomamba_jax.ops`."""

from twomamba_jax.layers.cache import Cache, ConvolutionInputs, MixerCache, cache_bytes, init_cache, roll_back
from twomamba_jax.layers.execution import Execution
from twomamba_jax.layers.language_model import Block, LanguageModel, head_kernel, head_logits
from twomamba_jax.layers.mixer import Mixer
from twomamba_jax.layers.mlp import SwiGLU
from twomamba_jax.layers.norm import RMSNorm

__all__ = [
    "Block",
    "Cache",
    "ConvolutionInputs",
    "Execution",
    "LanguageModel",
    "Mixer",
    "MixerCache",
    "RMSNorm",
    "SwiGLU",
    "cache_bytes",
    "head_kernel",
    "head_logits",
    "init_cache",
    "roll_back",
]
