"""Configurations: a Python file gives one, the command line overrides it, the model is built from it.

A configuration file defines `get_config(size)`, or `get_config()`, and returns an `ml_collections.ConfigDict`. The
type of each value in it is the type that an override must have; `config_dict.placeholder(int)` is an int or None.
"""

import ast
import importlib.util
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from train.errors import UserError, nearest, one_line
from train.keys import check_keys
from train.schedules import make_schedule
from twomamba_jax.config import ModelConfig
from twomamba_jax.layers import Execution, LanguageModel
from twomamba_jax.variants import parse_pattern

BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def load_config(spec: str) -> ConfigDict:
    """The configuration of `PATH` or `PATH:SIZE`; without a size, `get_config` chooses it.

    Raises UserError where the file is missing, fails when it is run, has no `get_config`, or refuses the size.
    """
    path, colon, size = spec.rpartition(":")
    if not colon or Path(spec).is_file():
        path, size = spec, ""
    if not Path(path).is_file():
        raise UserError(f"no configuration file {path!r}")
    # Names such as 2mamba.py are no Python identifiers, so `import` cannot reach them.
    module_spec = importlib.util.spec_from_file_location("_train_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"configuration file {path!r} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # Somebody else's code: reported under the file's name, whatever it is.
        raise UserError(f"configuration file {path!r} raised {type(error).__name__}: {one_line(error)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"configuration file {path!r} has no function get_config")
    if size and not inspect.signature(get_config).parameters:
        raise UserError(f"get_config of {path!r} takes no size, but {size!r} was asked for")
    try:
        config = get_config(size) if size else get_config()
    except ValueError as error:
        raise UserError(one_line(error)) from error
    except (Exception, SystemExit) as error:
        raise UserError(f"get_config of {path!r} raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path!r} returned {type(config).__name__}, not a ml_collections.ConfigDict")
    try:
        flatten(config)
    except RequiredValueError as error:
        raise UserError(
            f"get_config of {path!r} returned a required placeholder: give it a value that can be overridden"
        ) from error
    if isinstance(config, FrozenConfigDict):
        config = ConfigDict(config)
    return config.lock()


def parse_value(key: str, text: str, kind: type, optional: bool) -> Any:
    """`text` as a value of type `kind` (None is allowed where `optional`). Raises UserError naming `key`."""
    if optional and text.lower() == "none":
        return None
    wrong = UserError(f"--config.{key} takes {'None or ' if optional else ''}{kind.__name__}, got {text!r}")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise wrong
        return BOOLEANS[text.lower()]
    try:
        value = kind(text) if kind in (int, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # Those of literal_eval.
        raise wrong from None
    if not isinstance(value, kind) or (kind is float and not math.isfinite(value)):
        raise wrong
    return value


def apply_overrides(config: ConfigDict, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets each dotted key of `config` to its text, read as the type that the key already has.

    Raises UserError for a key that does not exist (naming the nearest) and for text of another type.
    """
    known = flatten(config)
    for key, text in overrides:
        group, _, name = key.rpartition(".")
        if key not in known:
            members = [other for other in known if other.startswith(f"{key}.")]
            if members:
                raise UserError(f"config key {key!r} is a group: set one of {', '.join(members)}")
            raise UserError(f"unknown config key {key!r}; {nearest(key, known)}")
        owner = config[group] if group else config
        # A reference is how a ConfigDict says that a value may be None (see placeholder).
        optional = isinstance(dict(owner.items(preserve_field_references=True))[name], FieldReference)
        value = parse_value(key, text, owner.get_type(name), optional)
        if isinstance(value, tuple) and len(value) != len(owner[name]):
            raise UserError(f"--config.{key} takes {len(owner[name])} values, got {text!r}")
        owner[name] = value


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def validate(config: ConfigDict) -> None:
    """Raises UserError where a key is missing or its value could not be trained with; build_model has the model's."""
    flat = flatten(config)
    check_keys(flat)
    for key, value in flat.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}={value!r} cannot be kept in config.json ({one_line(error)})") from error
    build_schedule(config)
    if config.profile.start is not None and config.profile.start > config.steps:
        raise UserError(f"profile.start={config.profile.start} must be at most steps={config.steps}, the last step")


def build_schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate of `config.optimizer`, which ends at its `decay_steps` or with the run. Raises UserError."""
    optimizer = config.optimizer
    return make_schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        optimizer.warmup_steps,
        config.steps if optimizer.decay_steps is None else optimizer.decay_steps,
        optimizer.final_fraction,
        optimizer.cooldown_steps,
    )


def build_model(config: ConfigDict) -> LanguageModel:
    """The language model of `config.variant`, `config.model` and `config.execution`.

    Raises UserError with the library's own message where it refuses them.
    """
    check_keys(flatten(config), ("variant", "model", "execution"))
    model, execution = config.model.to_dict(), config.execution.to_dict()
    for group, values, kind in (("model", model, ModelConfig), ("execution", execution, Execution)):
        known = {field.name for field in fields(kind)} - {"mixers"}
        for key in sorted(values.keys() - known):
            raise UserError(f"unknown config key '{group}.{key}'; {nearest(key, known)}")
    for key in ("dtype", "param_dtype"):
        if execution[key] not in DTYPES:
            raise UserError(f"unknown execution.{key} {execution[key]!r}; {nearest(execution[key], DTYPES)}")
        execution[key] = DTYPES[execution[key]]
    try:
        mixers = parse_pattern(config.variant, config.model.num_layers)
        return LanguageModel(ModelConfig(mixers=mixers, **model), Execution(**execution))
    except ValueError as error:
        raise UserError(one_line(error)) from error


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON text with sorted keys (tuples become lists)."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
