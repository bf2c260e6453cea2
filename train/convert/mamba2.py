"""Mamba-2 as released: Hugging Face's `Mamba2ForCausalLM`, and the checkpoints of state-spaces/mamba.

Both fuse the projections z, x, B, C and dt into one, and the convolutions of x, B and C; here x is v, B is k, C is q.
They differ in config.json, in the name of the embedding, and in the output norm where ngroups > 1: state-spaces'
normalises each group's channels apart, Hugging Face's all of them together, wherever it runs without their kernels.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.convert.reading import PickleFiles, SafetensorsFiles
from train.convert.tensors import Layers, Tensor, linear, same, vector
from train.errors import UserError
from twomamba_jax.config import ModelConfig
from twomamba_jax.variants import VARIANTS, entry_of, parse_pattern

# The variant that a released model is, with sizes of its own.
VARIANT = "mamba2-released"

HEAD = "lm_head.weight"

NO_LIMIT = [0.0, math.inf]

# What each config.json can ask for besides sizes, and the one value that this library computes. A key that is absent
# has it. Hugging Face's norm_before_gate is not among them: its program never reads it and multiplies by the gate
# first, while mistralai/Mamba-Codestral-7B-v0.1 says true.
HUGGING_FACE_ONLY = {
    "hidden_act": "silu",
    "use_bias": False,
    "rms_norm": True,
    "time_step_limit": NO_LIMIT,
}
STATE_SPACES_ONLY = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
MIXER_ONLY = {
    "layer": "Mamba2",
    "bias": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "d_ssm": None,
    "dt_limit": NO_LIMIT,
}
# Of ssm_cfg, with their defaults; what only initialises a layer or says how it is computed changes no checkpoint.
MIXER_SIZES = {
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "D_has_hdim": False,
    "conv_bias": True,
}
MIXER_IGNORED = (
    "A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor", "chunk_size", "use_mem_eff_path",
    "sequence_parallel",
)  # fmt: skip


@dataclass(frozen=True)
class Released:
    """One of the two layouts: its name, the key of its embedding, and its config.json as sizes of model and mixer.

    `read(config, source)` raises UserError for what a message can name, and ValueError, TypeError or ZeroDivisionError
    where a value is of another kind.
    """

    name: str
    embedding: str
    read: Callable[[Mapping[str, Any], str], tuple[dict[str, Any], dict[str, Any]]]

    def read_model(self, config: Mapping[str, Any], source: str) -> tuple[str, ModelConfig]:
        """The variant and the model that a config.json describes; `source` is its path, for messages.

        Raises UserError for a missing key, a setting that the library has not, sizes that do not fit.
        """
        try:
            sizes, changes = self.read(config, source)
            if changes["conv_width"] not in (2, 3, 4):
                raise ValueError(f"a convolution of {changes['conv_width']!r} tokens, expected 2, 3 or 4")
            variant = entry_of(VARIANT, dataclasses.replace(VARIANTS[VARIANT].mixer, **changes))
            return variant, ModelConfig(mixers=parse_pattern(variant, sizes["num_layers"]), mlp_dim=0, **sizes)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"{source}: {error}") from error

    def tensors(self, model: ModelConfig) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its key."""
        layers = Layers(model)
        found = {
            self.embedding: same(layers.outside("embedding", "embedding")),
            "backbone.norm_f.weight": vector(layers.outside("norm", "scale")),
        }
        if not model.tie_embeddings:
            found[HEAD] = linear(layers.outside("head"))
        for number in range(model.num_layers):
            layer = layer_tensors(layers.of(number), model)
            found |= {f"backbone.layers.{number}.{key}": tensor for key, tensor in layer.items()}
        return found

    def find_extras(self, files: SafetensorsFiles | PickleFiles, model: ModelConfig) -> Callable[[str], bool]:
        """Whether a tensor is a tied head. Raises UserError for one that is not the embedding."""
        if not model.tie_embeddings or HEAD not in files.entries:
            return lambda key: False
        if self.embedding in files.entries and not np.array_equal(files.read(HEAD), files.read(self.embedding)):
            raise UserError(
                f"{HEAD} is not {self.embedding}, and by config.json the two are tied: give the config.json that the "
                "checkpoint was saved with"
            )
        return lambda key: key == HEAD


def read_hugging_face(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config.json of Hugging Face's says: fields of `ModelConfig`, and of the mixer."""
    _check_only(config, HUGGING_FACE_ONLY, source)
    sizes = _required(
        config,
        (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim"),
            *("state_size", "n_groups", "conv_kernel", "expand"),
        ),
        source,
    )
    inner = sizes["num_heads"] * sizes["head_dim"]
    if sizes["expand"] * sizes["hidden_size"] != inner:
        raise ValueError(
            f"expand * hidden_size = {sizes['expand'] * sizes['hidden_size']}, expected num_heads * head_dim = {inner}"
        )
    model = {
        "vocab_size": sizes["vocab_size"],
        "d_model": sizes["hidden_size"],
        "num_layers": sizes["num_hidden_layers"],
        "num_heads": sizes["num_heads"],
        "head_dim": sizes["head_dim"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    return model, {
        "qk_dim": sizes["state_size"],
        "qk_groups": sizes["n_groups"],
        "conv_width": sizes["conv_kernel"],
        "conv_bias": config.get("use_conv_bias", True),
    }


def read_state_spaces(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a config.json of state-spaces/mamba."""
    _check_only(config, STATE_SPACES_ONLY, source)
    sizes = _required(config, ("d_model", "n_layer", "vocab_size", "ssm_cfg"), source)
    mixer = sizes["ssm_cfg"]
    if not isinstance(mixer, Mapping):
        raise UserError(f"{source}: ssm_cfg={mixer!r}, expected an object")
    # Without a layer it is Mamba-1, which has no heads.
    _check_only({"layer": "Mamba1", **mixer}, MIXER_ONLY, source, "ssm_cfg.")
    unknown = sorted(mixer.keys() - {*MIXER_ONLY, *MIXER_SIZES, *MIXER_IGNORED})
    if unknown:
        raise UserError(f"{source}: unknown ssm_cfg.{unknown[0]}: expected the arguments of state-spaces' Mamba2")
    mixer = MIXER_SIZES | {key: value for key, value in mixer.items() if key in MIXER_SIZES}
    inner = mixer["expand"] * sizes["d_model"]
    if inner % mixer["headdim"]:
        raise ValueError(f"expand * d_model = {inner}, expected a multiple of headdim = {mixer['headdim']}")
    multiple = config.get("pad_vocab_size_multiple", 8)
    model = {
        "vocab_size": -(-sizes["vocab_size"] // multiple) * multiple,
        "d_model": sizes["d_model"],
        "num_layers": sizes["n_layer"],
        "num_heads": inner // mixer["headdim"],
        "head_dim": mixer["headdim"],
        "tie_embeddings": config.get("tie_embeddings", True),
    }
    return model, {
        "qk_dim": mixer["d_state"],
        "qk_groups": mixer["ngroups"],
        "conv_width": mixer["d_conv"],
        "conv_bias": mixer["conv_bias"],
        "d_per_head": not mixer["D_has_hdim"],
        "norm_groups": mixer["ngroups"],
    }


HUGGING_FACE = Released("huggingface-mamba2", "backbone.embeddings.weight", read_hugging_face)
STATE_SPACES = Released("state-spaces", "backbone.embedding.weight", read_state_spaces)


def layer_tensors(ours: Mapping[str, Any], model: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a layer by their keys in it; `ours` are its parameters, as `Layers.of` gives them."""
    taps = linear(*(ours[f"mixer.conv_{x}_kernel"] for x in "vkq"))
    channels, width = taps.shape
    found = {
        "norm.weight": vector(ours["mixer_norm.scale"]),
        "mixer.in_proj.weight": linear(*(ours[f"mixer.{x}.kernel"] for x in ("z", "v", "k", "q", "dt"))),
        "mixer.conv1d.weight": dataclasses.replace(taps, shape=(channels, 1, width)),
        "mixer.dt_bias": same(ours["mixer.dt_bias"]),
        "mixer.A_log": same(ours["mixer.A_log"]),
        "mixer.D": vector(ours["mixer.D"]),
        "mixer.norm.weight": vector(ours["mixer.norm.scale"]),
        "mixer.out_proj.weight": linear(ours["mixer.out.kernel"], rows=model.d_model),
    }
    if "mixer.conv_v_bias" in ours:
        found["mixer.conv1d.bias"] = vector(*(ours[f"mixer.conv_{x}_bias"] for x in "vkq"))
    return found


def _check_only(config: Mapping[str, Any], only: Mapping[str, Any], source: str, prefix: str = "") -> None:
    for key, value in only.items():
        found = _floats(config.get(key, value))
        if found != value:
            raise UserError(
                f"{source}: {prefix}{key}={found!r}, expected {value!r}, which is what this library has of Mamba-2"
            )


def _floats(value: Any) -> Any:
    """A list with numbers for what transformers 5 writes in their place, {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_floats(one) for one in value]
    return float(value["__float__"]) if isinstance(value, Mapping) and value.keys() == {"__float__"} else value


def _required(config: Mapping[str, Any], keys: tuple[str, ...], source: str) -> dict[str, Any]:
    missing = [key for key in keys if key not in config]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: expected the config.json of save_pretrained")
    return {key: config[key] for key in keys}
