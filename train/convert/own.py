"""The layout of this library: every variant, one tensor a parameter of each layer, and a config.json that says all.

`config.json` has `format`, `version`, `variant` (a pattern of `twomamba_jax.parse_pattern`), `mixers` (what the pattern
was: [{"count": n, "mixer": {...}}]), `model` (`ModelConfig` but for its mixers), `length`, and `tokenizer`.
Tensors are named by their path: `layers.3.mixer.q.kernel` is [E, H, K]. docs/weights.md lists them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.convert.tensors import Layers, Tensor, same
from train.errors import UserError
from twomamba_jax.config import MixerConfig, ModelConfig
from twomamba_jax.variants import parse_pattern

FORMAT, VERSION = "twomamba-jax", 1


def describe(variant: str, model: ModelConfig, length: int, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model of `variant`, trained on rows of `length` tokens."""
    sizes = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name != "mixers"}
    mixers = [{"count": count, "mixer": dataclasses.asdict(mixer)} for mixer, count in model.layer_runs]
    return {
        "format": FORMAT,
        "version": VERSION,
        "variant": variant,
        "mixers": mixers,
        "model": sizes,
        "length": length,
        "tokenizer": dict(tokenizer),
    }


def read_model(config: Mapping[str, Any], source: str) -> tuple[str, ModelConfig]:
    """The variant and the model that a config.json describes; `source` is its path, for messages.

    Raises UserError for another version, or a variant that is another mixer here.
    """
    if config.get("version") != VERSION:
        raise UserError(
            f"{source} is of version {config.get('version')!r} of this layout, expected {VERSION}: import it with the "
            "release of twomamba-jax that wrote it"
        )
    try:
        variant, sizes = config["variant"], config["model"]
        mixers = [MixerConfig(**run["mixer"]) for run in config["mixers"] for _ in range(run["count"])]
        model = ModelConfig(mixers=parse_pattern(variant, sizes["num_layers"]), **sizes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} describes no model ({type(error).__name__}: {error}): export it again") from error
    for layer, (there, here) in enumerate(zip(mixers, model.layer_mixers)):
        changed = [
            f"{field.name}={getattr(there, field.name)!r} there and {getattr(here, field.name)!r} here"
            for field in dataclasses.fields(there)
            if getattr(there, field.name) != getattr(here, field.name)
        ]
        if changed:
            raise UserError(
                f"{source}: variant {variant!r} is another mixer in layer {layer}: {', '.join(changed)}; import it "
                "with the release of twomamba-jax that wrote it"
            )
    return variant, model


def tensors(model: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its key."""
    layers = Layers(model)
    found = {
        "embedding": same(layers.outside("embedding", "embedding")),
        "norm.scale": same(layers.outside("norm", "scale")),
    }
    if not model.tie_embeddings:
        found["head"] = same(layers.outside("head"))
    for number in range(model.num_layers):
        found |= {f"layers.{number}.{path}": same(one) for path, one in layers.of(number).items()}
    return found
