"""A tiny corpus and a tiny run, small enough that a test can afford to train."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import sentencepiece
import tokenizers

import train
from train import loop
from train.data.corpus import read_corpus
from train.main import main
from train.observe.meter import COSTS
from train.observe.metrics import read_metrics
from train.step import TrainState

# Where `python -m train.main` works: the directory that holds the package under test.
ROOT = Path(train.__file__).parents[1]

TINY = {
    "model.d_model": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "length": 32,
    "batch_size": 4,
    "steps": 12,
    "optimizer.warmup_steps": 2,
    "optimizer.decay_steps": 100,  # runs of any length are one program
    "log_every": 2,
    "eval_every": 4,
    "eval_rows": 6,
    "checkpoint_every": 4,
    "sample.tokens": 8,
    "variant": "softmax",  # less to compile
    "execution.remat": "none",
}


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    """Runs of one configuration in one process share their jitted functions, and so what JAX has traced of them."""

    def remembered(function, key=lambda *arguments: arguments):
        results = {}

        def call(*arguments, **options):
            place = key(*arguments), *sorted(options.items())
            if place not in results:
                results[place] = function(*arguments, **options), arguments  # which stay, or an id were another's
            return results[place][0]

        return call

    def schedule_key(config):
        return str(config.optimizer.to_dict()), config.steps if config.optimizer.decay_steps is None else None

    def with_state(*arguments):
        return tuple(id(x) if isinstance(x, TrainState) else x for x in arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_schedule", remembered(loop.build_schedule, schedule_key))
        patch.setattr(loop, "make_optimizer", remembered(loop.make_optimizer))
        patch.setattr(loop, "make_init", remembered(loop.make_init))
        for name in ("make_eval_step", "make_train_step"):
            patch.setattr(loop, name, remembered(getattr(loop, name), with_state))
        yield


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory) -> Path:
    """Forty files of a few lines; about a tenth of them is held out."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        body = "".join(f"def f{number}_{line}(x):\n    return x + {number * line}\n\n" for line in range(4))
        (root / f"file{number:02d}.py").write_text(body)
    return root


@pytest.fixture(scope="session")
def tiny(corpus_root):
    """A function from (workdir, changed keys) to the arguments of a tiny run of configs/2mamba.py."""

    def arguments(workdir: Path, config: str = "configs/2mamba.py", **changes: object) -> list[str]:
        values = TINY | {"data.root": corpus_root, "data.held_out_percent": 10}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        return ["--config", str(ROOT / config), "--workdir", str(workdir), *overrides]

    return arguments


@pytest.fixture
def user_error(capsys):
    """A function that runs the command line in this process and returns the one line that it must end with."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def start(compilation_cache):
    """A function that starts the command line in a process of its own, with the programs that this one has compiled."""
    variables = {key.upper(): str(value) for key, value in compilation_cache.items()}
    variables |= {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def run(arguments: list[str]) -> subprocess.Popen[str]:
        environment = os.environ | variables
        command = [sys.executable, "-m", "train.main", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    return run


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The workdir of a tiny run that has ended; tests that change it work on a copy."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny(workdir)) == 0
    return workdir


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 400 tokens, trained on a part of the default corpus."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = read_corpus(None, ".py", 5).train[:200]
    tokenizer.train_from_iterator((bytes(one).decode("utf-8", "replace") for one in documents), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    """A model like Llama 2's, of 300 tokens: BPE that falls back to bytes and changes no text."""
    path = tmp_path_factory.mktemp("tokenizer") / "llama.model"
    lines = [line for number in range(40) for line in (f"def f{number}(x):", "    return x + 1", "class Thing:")]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


def arrays_of(workdir: Path, step: int):
    """The arrays of a checkpoint, read without the training code."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((workdir / "checkpoints" / str(step) / "state").resolve())
    return {path: np.asarray(leaf) for path, leaf in flatten(tree)}


def flatten(tree, path=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        return [] if tree is None else [(path, tree)]
    return [leaf for key, value in items for leaf in flatten(value, f"{path}/{key}")]


def without_times(records):
    return [{key: value for key, value in record.items() if key not in COSTS} for record in records]


@pytest.fixture(scope="session")
def same_end():
    """A function that asserts that two runs are equal bit for bit: parameters, optimiser, metrics but for times."""
    return assert_same_end


def assert_same_end(workdir: Path, reference: Path, step: int) -> None:
    """Parameters, optimiser and metrics of two runs are equal bit for bit, times aside."""
    assert without_times(read_metrics(workdir / "metrics.jsonl")) == without_times(
        read_metrics(reference / "metrics.jsonl")
    )
    found, expected = arrays_of(workdir, step), arrays_of(reference, step)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for path in expected:
        assert found[path].tobytes() == expected[path].tobytes(), path
    assert (workdir / "sample.txt").read_text() == (reference / "sample.txt").read_text()
