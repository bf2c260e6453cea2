"""From a checkpoint directory to a workdir that `train.generate` and `train.main` take."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from train.checkpoint import save_params
from train.configuration import to_json, validate
from train.convert import authors, own
from train.convert.parameters import check_tensors, read_parameters
from train.convert.reading import PickleFiles, SafetensorsFiles, open_tensors, read_json
from train.convert.tensors import parameter_shapes
from train.convert.tokenizer import check_tokenizer, find_tokenizer
from train.data.tokenizers import has_file, keep_tokenizer, kept_path
from train.errors import UserError
from train.workdir import replace, writing
from twomamba_jax.config import ModelConfig

# A run that goes on from imported parameters changes them less and in fewer steps than one from none. These are where
# to start from, not measured.
FINE_TUNING = {
    "steps": 1000,
    "batch_size": 8,
    "optimizer.learning_rate": 2e-5,
    "optimizer.warmup_steps": 100,
    "optimizer.schedule": "cosine",
    "optimizer.decay_steps": None,
    "optimizer.clip_norm": 1.0,
    "eval_every": 200,
    "checkpoint_every": 200,
    "log_every": 10,
}

CONFIG = '''\
"""Fine-tunes imported parameters, with a fresh optimiser.

Command: python -m train.main --config {place}/config.py --workdir {place} --config.data.source=files \\
    --config.data.paths=TEXT
"""

from pathlib import Path

from configs import base


def get_config():
    """The imported model, on data that the command line names."""
    config = base.get_config(name={name!r}, variant={variant!r}, size="medium")
    config.size = "imported"
    for key, value in MODEL.items():
        config.model[key] = value
    for key, value in RUN.items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    config.data.tokenizer = {tokenizer}
    return config


MODEL = {model!r}
RUN = {run!r}
'''


def import_checkpoint(directory: Path, workdir: Path, tokenizer: str | None, report: Callable[[str], None]) -> None:
    """Makes `workdir` of the checkpoint in `directory`: its parameters in float32 as step 0, and its tokenizer.

    `tokenizer` takes the place of the checkpoint's own. Raises UserError for all that does not fit, before anything is
    written.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir {workdir} is not empty: choose another, or remove it")
    source = directory / "config.json"
    described = read_json(source)
    is_own = described.get("format") == own.FORMAT
    variant, model = (own if is_own else authors).read_model(described, str(source))
    tensors = (own if is_own else authors).tensors(model)
    files = open_tensors(directory)
    check_tensors(files, tensors, (lambda _: False) if is_own else _buffers(files, model))
    data = find_tokenizer(directory, described, model.vocab_size, tokenizer)
    digest = check_tokenizer(data, model.vocab_size).digest
    length = described.get("length" if is_own else "max_position_embeddings", 2048)
    config = make_config(directory.resolve().name, variant, model, length, data)

    params = read_parameters(files, tensors, parameter_shapes(model))
    corpus = {"imported": {"directory": directory.name, "layout": "own" if is_own else "authors"}, "tokenizer": digest}
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        keep_tokenizer(config.data.tokenizer, workdir)
        replace(workdir / "config.py", config_file(config, workdir))
        # Last of all: with it the workdir is a run.
        save_params(workdir, params)
        replace(workdir / "corpus.json", json.dumps(corpus, indent=2, sort_keys=True) + "\n")
        replace(workdir / "config.json", to_json(config))
    dtypes = sorted({files.entries[key].dtype for key in tensors})
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    report(f"{variant}: {count:,} parameters, {', '.join(dtypes)} there and float32 here, in {workdir}")
    if data["tokenizer"].startswith("ids:"):
        report(
            f"{directory} has no tokenizer: a text is its tokens' numbers, '5 17 3' say, unless --tokenizer names one"
        )
    report(f"to continue a prompt: python -m train.generate --workdir {workdir} --prompt TEXT")
    report(
        f"to train it further: python -m train.main --config {workdir}/config.py --workdir {workdir} "
        "--config.data.source=files --config.data.paths=TEXT"
    )


def make_config(name: str, variant: str, model: ModelConfig, length: int, data: Mapping[str, Any]) -> ConfigDict:
    """The configuration of a run that goes on from imported parameters."""
    config = base.get_config(name=name, variant=variant, size="medium")
    config.size = "imported"
    for key, value in dataclasses.asdict(model).items():
        if key != "mixers":
            config.model[key] = value
    run = FINE_TUNING | {"execution.dtype": "float32", "data.source": "files", "length": min(length, 2048)}
    for key, value in run.items():
        group, _, last = key.rpartition(".")
        (config[group] if group else config)[last] = value
    for key, value in data.items():
        config.data[key] = value
    validate(config)
    return config


def config_file(config: ConfigDict, workdir: Path) -> str:
    """The configuration file of `make_config`, as Python, to be kept in `workdir`."""
    spec = config.data.tokenizer
    keys = [*FINE_TUNING, "execution.dtype", "data.source", "data.eos_token", "data.bos_token", "length"]
    run = {}
    for key in keys:
        group, _, last = key.rpartition(".")
        run[key] = (config[group] if group else config)[last]
    beside = f"str(Path(__file__).parent / {kept_path(spec, workdir).name!r})" if has_file(spec) else repr(spec)
    model = config.model.to_dict()
    return CONFIG.format(
        place=workdir, name=config.name, variant=config.variant, tokenizer=beside, model=model, run=run
    )


def _buffers(files: SafetensorsFiles | PickleFiles, model: ModelConfig) -> Callable[[str], bool]:
    """Whether a tensor is a buffer of the authors' layers. Raises UserError for frequencies that are not theta's."""
    keys = {
        f"model.layers.{number}.{authors.FREQUENCIES}" for number, mixer in enumerate(model.layer_mixers) if mixer.rope
    }
    for key in sorted(keys):
        if key not in files.entries:
            raise UserError(f"the checkpoint lacks {key}, the frequencies of its rotary embedding: fetch it again")
        found, expected = files.read(key).astype(np.float32), authors.rotary_frequencies(model)
        # Two units in the last place of a half, if they are that; powers of float32 differ by a few.
        tolerance = {"BF16": 2.0**-7, "F16": 2.0**-9}.get(files.entries[key].dtype, 1e-5)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=tolerance, atol=0):
            raise UserError(
                f"{key} is not rope_theta^(-2 i / K) with rope_theta={model.rope_theta}, expected "
                f"{_some(expected)}, found {_some(found)}: give the config.json that it was saved with; other "
                "frequencies are not to be had here"
            )
    return lambda key: key in keys or key.endswith(f".{authors.MASK}")


def _some(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.5g}" for value in values.ravel()[:3]) + ", ...]"
