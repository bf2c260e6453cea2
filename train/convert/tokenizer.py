"""The tokenizer of a checkpoint directory, as the keys `tokenizer`, `eos_token` and `bos_token` of a run's data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.convert.reading import read_json
from train.data.tokenizers import IDS, Tokenizer, load_tokenizer
from train.errors import UserError

# In this order: Llama 2's directories have both, and the paper's code took the first.
FILES = ("tokenizer.model", "tokenizer.json")


def find_tokenizer(directory: Path, config: Mapping[str, Any], vocab_size: int, given: str | None) -> dict[str, Any]:
    """What `data.tokenizer`, `data.eos_token` and `data.bos_token` are for a checkpoint of `vocab_size` tokens.

    `given` is the user's own choice. A directory without one has a tokenizer of numbers, "ids:N". Raises UserError
    where the special tokens of config.json are not the tokenizer's.
    """
    own = config.get("tokenizer")
    if given is None and isinstance(own, Mapping):  # this library's layout says what it has
        spec = str(own["tokenizer"])
        spec = str(directory / spec) if spec in FILES else spec
        return {"tokenizer": spec, "eos_token": own["eos_token"], "bos_token": own["bos_token"]}
    spec = given or next((str(directory / name) for name in FILES if (directory / name).is_file()), None)
    eos_id, bos_id = (_token_id(config, key, directory) for key in ("eos_token_id", "bos_token_id"))
    if spec is None:
        numbers = {"eos_token": eos_id, "bos_token": bos_id}
        return {"tokenizer": f"{IDS}{vocab_size}"} | {
            key: None if number is None else str(number) for key, number in numbers.items()
        }
    if not spec.endswith(".json"):
        return {"tokenizer": spec, "eos_token": None, "bos_token": None}
    names = _names(Path(spec), {eos_id, bos_id} - {None})
    return {"tokenizer": spec, "eos_token": names.get(eos_id), "bos_token": names.get(bos_id)}


def check_tokenizer(data: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer that `data` names. Raises UserError where it has tokens that the model does not."""
    tokenizer = load_tokenizer(data["tokenizer"], data["eos_token"], data["bos_token"])
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {data['tokenizer']!r} has {tokenizer.vocab_size} tokens, expected at most vocab_size="
            f"{vocab_size}: give the checkpoint's own by --tokenizer"
        )
    return tokenizer


def _token_id(config: Mapping[str, Any], key: str, directory: Path) -> int | None:
    """The number of a special token; of several the first."""
    value = config.get(key)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and (not isinstance(value, int) or value < 0):
        raise UserError(f"{directory / 'config.json'}: {key}={value!r}, expected the number of a token, or null")
    return value


def _names(path: Path, ids: set[Any]) -> dict[Any, str]:
    """The names of some tokens of a tokenizer.json."""
    try:
        content = read_json(path)
        names = {one["id"]: one["content"] for one in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, Mapping) else []
        names |= {number: name for name, number in pairs if number in ids and number not in names}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no tokenizer.json: fetch it again, or give another by --tokenizer") from error
    return names
