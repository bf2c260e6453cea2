"""From a run to a checkpoint directory: its parameters as safetensors, config.json, its tokenizer, a model card."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from ml_collections import ConfigDict

from train.checkpoint import Which
from train.configuration import build_model
from train.convert import authors, own
from train.convert.card import model_card
from train.convert.tensors import Tensor
from train.convert.writing import Output, write_tensors
from train.data.tokenizers import has_file, kept_path, load_kept_tokenizer
from train.errors import UserError
from train.restore import read_saved_config, restore_on_one_device
from train.workdir import writing
from twomamba_jax.config import ModelConfig

Layout = Literal["own", "authors"]

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export_run(
    workdir: Path,
    directory: Path,
    layout: Layout,
    which: Which,
    report: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Writes the best or the latest checkpoint of the run in `workdir` into `directory`, which is new or empty.

    The tensors have the run's `execution.param_dtype`, and no bit of them changes. Raises UserError where there is no
    such run, or the layout has not its model, before anything is written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--out {directory} is not empty: choose another, or remove it")
    config = ConfigDict(read_saved_config(workdir))
    model = build_model(config)
    tokenizer = load_kept_tokenizer(config.data, workdir) if "tokenizer" in config.data else None
    special = {"bos_id": getattr(tokenizer, "bos_id", None), "eos_id": getattr(tokenizer, "eos_id", None)}
    if layout == "own":
        described = own.describe(config.variant, model.config, config.length, _tokenizer(config, special))
        tensors = own.tensors(model.config)
    else:
        described = authors.describe(model.config, config.length, **special)
        tensors = authors.tensors(model.config)
        _warn_of_differences(model.config, config, warn)

    params, step = restore_on_one_device(workdir, model, which, warn)
    outputs = _outputs(tensors, jax.tree.map(np.asarray, params))
    if layout == "authors":
        outputs |= _buffers(model.config, config.length)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory, outputs)
        if tokenizer is not None and has_file(config.data.tokenizer):
            kept = kept_path(config.data.tokenizer, workdir)
            shutil.copyfile(kept, directory / kept.name)
        (directory / "README.md").write_text(model_card(workdir, config, count, step, layout), encoding="utf-8")
        (directory / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    report(f"step {step} of {workdir}: {count:,} parameters, {len(outputs)} tensors, in {directory}")


def _tokenizer(config: ConfigDict, special: Mapping[str, int | None]) -> dict[str, Any]:
    """What our own config.json says of the tokenizer: where its file is in the directory, and its special tokens."""
    if "tokenizer" not in config.data:
        return {"tokenizer": f"ids:{config.model.vocab_size}", "eos_token": None, "bos_token": None}
    spec = config.data.tokenizer
    return {
        "tokenizer": kept_path(spec, Path()).name if has_file(spec) else spec,
        "eos_token": config.data.eos_token,
        "bos_token": config.data.bos_token,
    } | dict(special)


def _warn_of_differences(model: ModelConfig, config: ConfigDict, warn: Callable[[str], None]) -> None:
    norms = {mixer.norm for mixer in model.layer_mixers}
    eps = model.norm_eps if model.output_norm_eps is None else model.output_norm_eps
    if "output" in norms and eps != authors.OUTPUT_NORM_EPS:
        warn(
            f"the authors' code has an epsilon of {authors.OUTPUT_NORM_EPS:.3g} in its output norm, and this model one "
            f"of {eps:.3g}: its outputs differ there by 5e-6 to 5e-4; config.json keeps it, and an import here takes it"
        )
    if not has_file(config.data.get("tokenizer", "bytes")):
        warn("the authors' layout has no place for a tokenizer that is not a file: give --tokenizer to an import")


def _outputs(tensors: Mapping[str, Tensor], params: Any) -> dict[str, Output]:
    (dtype,) = {NAMES[str(leaf.dtype)] for leaf in jax.tree.leaves(params)}
    return {
        key: Output(dtype, tensor.shape, lambda tensor=tensor: tensor.pack(params)) for key, tensor in tensors.items()
    }


def _buffers(model: ModelConfig, length: int) -> dict[str, Output]:
    def mask() -> np.ndarray:
        return ~np.tri(length, dtype=bool)

    return {
        key: Output(dtype, shape, mask if dtype == "BOOL" else lambda: authors.rotary_frequencies(model))
        for key, (dtype, shape) in authors.buffers(model, length).items()
    }
