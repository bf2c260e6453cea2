"""The layout of the paper's authors: a Llama directory of Hugging Face's, with `attention_type` in its config.json.

Their layers have no key/value heads of their own, and biases only in the convolution and the Z projection. Queries,
keys and values are one fused projection, and one convolution, whose last tap is the current token.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from train.convert.reading import PickleFiles, SafetensorsFiles
from train.convert.tensors import Layers, Tensor, linear, same, vector
from train.errors import UserError, nearest
from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.variants import VARIANTS, parse_pattern

# Their `attention_type`, and the variant that it is here.
ATTENTION_TYPES = {
    "softmax": "softmax",
    "linear": "linear",
    "linear__output_norm": "output-norm",
    "linear__output_norm__ReLU": "output-norm-relu",
    "linear__output_norm__in_conv_k_2": "conv2",
    "linear__output_norm__in_conv_k_3": "conv3",
    "linear__output_norm__in_conv_k_4": "conv4",
    "linear__output_norm__in_conv_k_2__silu": "conv2-silu",
    "linear__output_norm__in_conv_k_3__silu": "conv3-silu",
    "linear__output_norm__in_conv_k_4__silu": "conv4-silu",
    "linear__output_norm__D_res": "d-residual",
    "linear__output_norm__Z_out_gate": "z-gate",
    "linear__output_norm__dt_on_values": "value-dt",
    "linear__output_norm__A_mask_type_discretize": "decay-original",
    "linear__output_norm__A_mask_type_neg_softplus": "decay-softplus",
    "linear__output_norm__A_mask_type_discretize__in_conv_k_2": "conv2-decay-original",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2": "conv2-decay-softplus",
    "linear__out_norm__A_mask_type_neg_softplus__in_conv_k_2": "conv2-decay-softplus",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": "mamba2s",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__silu": "mamba2s-silu",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__D_res": "mamba2s-d-residual",
    "linear__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values__Z_out_gate": "mamba2s-z-gate",
    "squared__output_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": "squared-output-norm",
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2": "2mamba",
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": "2mamba-dt",
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2": "2mamba-e",
    "exp__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values": "2mamba-e-dt",
}

# Their output norm is PyTorch's without an epsilon, which takes float32's.
OUTPUT_NORM_EPS = float(np.finfo(np.float32).eps)

# A buffer that is a function of the sizes; rotary_emb.freqs is one too, but it may be another function.
MASK, FREQUENCIES = "self_attn.attn_mask", "self_attn.rotary_emb.freqs"

# What else their config.json can ask for, and the one value that their layers and this library compute.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}


def read_model(config: Mapping[str, Any], source: str) -> tuple[str, ModelConfig]:
    """The variant and the model that a config.json describes; `source` is its path, for messages.

    Raises UserError for an attention type or a setting that the library has not, a missing key, sizes that do not fit.
    """
    if "attention_type" not in config:
        raise UserError(
            f"{source} has no attention_type, so it is not of the paper's authors: expected one that their trainer "
            "wrote, a released Mamba-2 (model_type='mamba2', or ssm_cfg), or a directory that `python -m train.convert "
            "export` made"
        )
    name = config["attention_type"]
    if name == "mamba":
        raise UserError(
            f"{source}: attention_type='mamba' is the authors' baseline (mamba_layer.*), one 64-wide head of mamba_ssm "
            "beside a gated MLP, which this library does not have; import one of their other attention types"
        )
    if name not in ATTENTION_TYPES:
        raise UserError(f"{source}: unknown attention_type {name!r}; {nearest(str(name), ATTENTION_TYPES)}")
    for key, only in ONLY.items():
        if config.get(key, only) != only:
            raise UserError(
                f"{source}: {key}={config[key]!r}, expected {only!r}: the authors' layers have nothing else, so this "
                "checkpoint is of another program"
            )
    sizes = {
        "vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "mlp_dim": "intermediate_size",
    }  # fmt: skip
    missing = [key for key in sizes.values() if key not in config]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: expected the config.json of save_pretrained")
    values = {ours: config[theirs] for ours, theirs in sizes.items()}
    heads = values["num_heads"]
    if config.get("num_key_value_heads", heads) != heads:
        raise UserError(
            f"{source}: num_key_value_heads={config['num_key_value_heads']}, expected num_attention_heads={heads}: the "
            "authors' layers do not share keys and values between heads"
        )
    variant = ATTENTION_TYPES[name]
    try:
        model = ModelConfig(
            mixers=parse_pattern(variant, values["num_layers"]),
            head_dim=config.get("head_dim") or values["d_model"] // heads,
            rope_theta=config.get("rope_theta", 10000.0),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            output_norm_eps=config.get("output_norm_eps", OUTPUT_NORM_EPS),
            **values,
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{source}: {error}") from error
    if model.d_model != heads * model.head_dim:
        raise UserError(
            f"{source}: hidden_size={model.d_model}, expected num_attention_heads * head_dim = {heads * model.head_dim}"
        )
    return variant, model


def attention_type(model: ModelConfig) -> str:
    """The `attention_type` of a model. Raises UserError where the authors have no such model, saying why."""
    types: dict[MixerConfig, str] = {}
    for name, variant in ATTENTION_TYPES.items():
        types.setdefault(VARIANTS[variant].mixer, name)
    mixers = set(model.layer_mixers)
    if len(mixers) > 1:
        raise UserError(
            "the authors' layout has one mixer for all layers, and this model has several: use --layout own"
        )
    (mixer,) = mixers
    if mixer not in types:
        raise UserError("the authors' layout has no attention_type for this model's mixer: use --layout own")
    if model.tie_embeddings:
        raise UserError("the authors' layout has a head of its own, and this model ties it: use --layout own")
    if model.kv_heads != model.num_heads:
        raise UserError(
            f"the authors' layout has as many key/value heads as heads, {model.num_heads}, and this model has "
            f"{model.kv_heads}: use --layout own"
        )
    if model.num_heads * model.head_dim != model.d_model or not model.mlp_dim:
        raise UserError(
            f"the authors' layout has num_heads * head_dim = d_model and an MLP, and this model has num_heads="
            f"{model.num_heads}, head_dim={model.head_dim}, d_model={model.d_model}, mlp_dim={model.mlp_dim}: use "
            "--layout own"
        )
    return types[mixer]


def describe(model: ModelConfig, length: int, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The config.json of a model that was trained on rows of `length` tokens. Raises UserError as `attention_type`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_type": attention_type(model),
        "bos_token_id": bos_id,
        "dtype": "float32",
        "eos_token_id": eos_id,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.d_model,
        "initializer_range": 0.02,
        "intermediate_size": model.mlp_dim,
        "max_position_embeddings": length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_heads,
        # Not theirs: their code ignores it, and an import here takes it.
        "output_norm_eps": model.norm_eps if model.output_norm_eps is None else model.output_norm_eps,
        "pretraining_tp": 1,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": None,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its key, buffers left out."""
    layers = Layers(model)
    found = {
        "model.embed_tokens.weight": same(layers.outside("embedding", "embedding")),
        "model.norm.weight": vector(layers.outside("norm", "scale")),
        "lm_head.weight": linear(layers.outside("head")),
    }
    for number in range(model.num_layers):
        layer = layer_tensors(layers.of(number), model)
        found |= {f"model.layers.{number}.{key}": tensor for key, tensor in layer.items()}
    return found


def layer_tensors(ours: dict[str, Any], model: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a layer by their keys in it; `ours` are its parameters, as `Layers.of` gives them."""
    found = {
        "input_layernorm.weight": vector(ours["mixer_norm.scale"]),
        "post_attention_layernorm.weight": vector(ours["mlp_norm.scale"]),
        "mlp.gate_proj.weight": linear(ours["mlp.gate.kernel"]),
        "mlp.up_proj.weight": linear(ours["mlp.up.kernel"]),
        "mlp.down_proj.weight": linear(ours["mlp.down.kernel"]),
        "self_attn.qkv_proj.weight": linear(*(ours[f"mixer.{x}.kernel"] for x in "qkv")),
        "self_attn.o_proj.weight": linear(ours["mixer.out.kernel"], rows=model.d_model),
    }
    if "mixer.conv_q_kernel" in ours:
        taps = linear(*(ours[f"mixer.conv_{x}_kernel"] for x in "qkv"))
        channels, width = taps.shape
        found["self_attn.conv1d.weight"] = dataclasses.replace(taps, shape=(channels, 1, width))
        found["self_attn.conv1d.bias"] = vector(*(ours[f"mixer.conv_{x}_bias"] for x in "qkv"))
    for key, name, kind in (
        ("A_mask_proj.weight", "decay.kernel", linear),
        ("dt_proj.weight", "dt.kernel", linear),
        ("A_log", "A_log", same),
        ("D", "D", same),
        ("z_gate_proj.weight", "z.kernel", linear),
        ("z_gate_proj.bias", "z.bias", vector),
        ("out_norm.weight", "norm.scale", vector),
    ):
        if f"mixer.{name}" in ours:
            found[f"self_attn.{key}"] = kind(ours[f"mixer.{name}"])
    return found


def rotary_frequencies(model: ModelConfig) -> np.ndarray:
    """theta^(-2 i / K), float32 [K / 2]: what `rotary_emb.freqs` must hold."""
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float64) / model.head_dim
    return (model.rope_theta**-exponents).astype(np.float32)


def buffers(model: ModelConfig, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype of safetensors, shape) of what a checkpoint has besides its parameters, by key."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number in range(model.num_layers):
        layer = f"model.layers.{number}."
        if model.layer_mixers[number].rope:
            found[layer + FREQUENCIES] = "F32", (model.head_dim // 2,)
        else:
            found[layer + MASK] = "BOOL", (1, 1, length, length)
    return found


def find_extras(files: SafetensorsFiles | PickleFiles, model: ModelConfig) -> Callable[[str], bool]:
    """Whether a tensor is a buffer of the authors' layers. Raises UserError for frequencies that are not theta's."""
    keys = {f"model.layers.{number}.{FREQUENCIES}" for number, mixer in enumerate(model.layer_mixers) if mixer.rope}
    for key in sorted(keys):
        if key not in files.entries:
            raise UserError(f"the checkpoint lacks {key}, the frequencies of its rotary embedding: fetch it again")
        found, expected = files.read(key).astype(np.float32), rotary_frequencies(model)
        # Two units in the last place of a half, if they are that; powers of float32 differ by a few.
        tolerance = {"BF16": 2.0**-7, "F16": 2.0**-9}.get(files.entries[key].dtype, 1e-5)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=tolerance, atol=0):
            raise UserError(
                f"{key} is not rope_theta^(-2 i / K) with rope_theta={model.rope_theta}, expected "
                f"{_some(expected)}, found {_some(found)}: give the config.json that it was saved with; other "
                "frequencies are not to be had here"
            )
    return lambda key: key in keys or key.endswith(f".{MASK}")


def _some(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.5g}" for value in values.ravel()[:3]) + ", ...]"
