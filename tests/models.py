"""The small model that the layers' tests share."""

from twomamba_jax import Execution, LanguageModel, ModelConfig, parse_pattern

SIZES = {"vocab_size": 23, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48}


def config_of(pattern, num_layers=1, **sizes):
    return ModelConfig(mixers=parse_pattern(pattern, num_layers), num_layers=num_layers, **SIZES | sizes)


def model_of(pattern, num_layers=1, **execution):
    return LanguageModel(config_of(pattern, num_layers), Execution(**execution))
