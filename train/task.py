"""The tasks that a configuration can name as `data.source`: their rows, their identity, what a sample looks like."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from train import corpus, recall
from train.data import PackedRows, Rows
from train.errors import UserError, nearest


@dataclass(frozen=True)
class Task:
    """Training and held-out rows with what the loop needs to know of them.

    `identity` is JSON and goes to the workdir, its "digest" is compared on resume. The sample continues `prompt`
    (int32 [T]); `truth` is the right continuation where there is one, and `render` makes text of tokens.
    """

    train: Rows
    held_out: Rows
    num_tokens: int
    identity: dict[str, Any]
    prompt: np.ndarray
    truth: np.ndarray | None
    render: Callable[[np.ndarray], str]


def corpus_task(config: ConfigDict) -> Task:
    """Byte tokens of source files, packed."""
    documents = corpus.read_corpus(config.data.root, config.data.suffix, config.data.held_out_percent)
    if not config.sample.prompt or config.sample.tokens < 1:
        raise UserError(
            f"sample.prompt={config.sample.prompt!r} and sample.tokens={config.sample.tokens} must not be empty"
        )
    identity = {
        "digest": documents.digest,
        "train_documents": len(documents.train),
        "train_bytes": sum(document.size for document in documents.train),
        "held_out_documents": len(documents.held_out),
        "held_out_bytes": sum(document.size for document in documents.held_out),
    }
    return Task(
        train=PackedRows(documents.train, config.length),
        held_out=PackedRows(documents.held_out, config.length),
        num_tokens=corpus.NUM_TOKENS,
        identity=identity,
        prompt=np.frombuffer(config.sample.prompt.encode(), np.uint8).astype(np.int32),
        truth=None,
        render=render_bytes,
    )


def render_bytes(tokens: np.ndarray) -> str:
    """The text up to the end of the document; what is no valid UTF-8, and what is no byte, shows as a question mark."""
    (ends,) = np.nonzero(tokens == corpus.END_OF_DOCUMENT)
    tokens = tokens[: ends[0]] if ends.size else tokens
    return bytes(int(token) if token < 256 else ord("?") for token in tokens).decode("utf-8", errors="replace")


def recall_task(config: ConfigDict) -> Task:
    """Random strings that repeat after a gap."""
    data = config.data
    sizes = {key: data[key] for key in ("symbols", "repeat", "fillers", "gap")} | {
        "seed": config.seed,
        "length": config.length,
    }
    train = recall.RecallRows(split="train", num_rows=data.train_rows, graded=data.graded, **sizes)
    held_out = recall.RecallRows(split="held_out", num_rows=data.held_out_rows, graded=False, **sizes)
    example = held_out[0]
    (repeat,) = np.nonzero((example["weights"] > 0) & (example["segment_ids"] == 1))
    return Task(
        train=train,
        held_out=held_out,
        num_tokens=train.num_tokens,
        identity={"digest": train.digest(), "train_rows": len(train), "held_out_rows": len(held_out)},
        prompt=example["tokens"][: repeat[0] + 1],
        truth=example["targets"][repeat],
        render=lambda tokens: " ".join(str(token) for token in tokens),
    )


TASKS: dict[str, Callable[[ConfigDict], Task]] = {"corpus": corpus_task, "recall": recall_task}


def make_task(config: ConfigDict) -> Task:
    """The task of `config.data`. Raises UserError for an unknown one, or tokens that the model's vocabulary lacks."""
    if config.data.source not in TASKS:
        raise UserError(f"unknown data.source {config.data.source!r}; {nearest(config.data.source, TASKS)}")
    task = TASKS[config.data.source](config)
    if config.model.vocab_size < task.num_tokens:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small: the data has tokens up to {task.num_tokens - 1}"
        )
    return task
