"""From a checkpoint directory to a workdir that `train.generate` and `train.main` take."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import base
from train.checkpoint import save_params
from train.configuration import to_json, validate
from train.convert.layouts import find_layout
from train.convert.parameters import check_tensors, read_parameters
from train.convert.reading import open_tensors, read_json
from train.convert.tokenizer import check_tokenizer, find_tokenizer
from train.data.tokenizers import IDS, has_file, keep_tokenizer, kept_path
from train.errors import UserError
from train.restore import parameter_shapes
from train.workdir import replace, writing
from twomamba_jax.config import ModelConfig
from twomamba_jax.layers import LanguageModel

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
    layout = find_layout(described)
    variant, model = layout.read_model(described, str(source))
    tensors = layout.tensors(model)
    files = open_tensors(directory)
    check_tensors(files, tensors, layout.find_extras(files, model))
    data = find_tokenizer(directory, described, model.vocab_size, tokenizer)
    digest = check_tokenizer(data, model.vocab_size).digest
    length = described.get(layout.length, 2048)
    config = make_config(directory.resolve().name, variant, model, length, data)

    params = read_parameters(files, tensors, parameter_shapes(LanguageModel(model)))
    corpus = {"imported": {"directory": directory.name, "layout": layout.name}, "tokenizer": digest}
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
    if data["tokenizer"].startswith(IDS):
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
    if data["tokenizer"].startswith(IDS):
        config.sample.prompt = "0"  # a token, whatever it means
    validate(config)
    return config


def config_file(config: ConfigDict, workdir: Path) -> str:
    """The configuration file of `make_config`, as Python, to be kept in `workdir`."""
    spec = config.data.tokenizer
    keys = [
        *FINE_TUNING,
        "execution.dtype",
        "data.source",
        "data.eos_token",
        "data.bos_token",
        "length",
        "sample.prompt",
    ]
    run = {}
    for key in keys:
        group, _, last = key.rpartition(".")
        run[key] = (config[group] if group else config)[last]
    beside = f"str(Path(__file__).parent / {kept_path(spec, workdir).name!r})" if has_file(spec) else repr(spec)
    model = config.model.to_dict()
    return CONFIG.format(
        place=workdir, name=config.name, variant=config.variant, tokenizer=beside, model=model, run=run
    )
