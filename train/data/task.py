"""The tasks that a configuration can name as `data.source`: their rows, their identity, what a sample looks like."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from train.data import recall, text
from train.data.rows import PACKINGS, Rows
from train.data.stream import StreamedRows
from train.data.tokenizers import Tokenizer, load_tokenizer
from train.errors import UserError, nearest

# Keys that name data, and the one source that reads each.
SOURCE_OF = {"paths": "files", "held_out_paths": "files", "dataset": "huggingface", "held_out_split": "huggingface"}


@dataclass(frozen=True)
class Task:
    """Training and held-out rows with what the loop needs to know of them.

    `identity` is JSON and goes to the workdir; its "digest" and "tokenizer" are compared on resume. The sample
    continues `prompt` (int32 [T]); `truth` is the right continuation where there is one, and `render` makes text of
    tokens. Tasks of text have a tokenizer, and the number of held-out targets over the bytes of the held-out text.
    """

    train: Rows | StreamedRows
    held_out: Rows
    identity: dict[str, Any]
    prompt: np.ndarray
    render: Callable[[np.ndarray], str]
    truth: np.ndarray | None = None
    tokenizer: Tokenizer | None = None
    targets_per_byte: float | None = None


def text_task(config: ConfigDict, read: text.Reader, report: Callable[[str], None]) -> Task:
    """Documents of text, tokenised and cut into rows."""
    data = config.data
    if not config.sample.prompt or config.sample.tokens < 1:
        raise UserError(
            f"sample.prompt={config.sample.prompt!r} and sample.tokens={config.sample.tokens} must not be empty"
        )
    if data.packing not in PACKINGS:
        raise UserError(f"unknown data.packing {data.packing!r}; {nearest(data.packing, PACKINGS)}")
    tokenizer = load_tokenizer(data.tokenizer, data.eos_token, data.bos_token)
    check_vocabulary(config, tokenizer.vocab_size)
    train, held_out, identity = read(config, tokenizer, report)
    make_rows = PACKINGS[data.packing]

    def render(tokens: np.ndarray) -> str:
        """The text up to the end of the document."""
        (ends,) = np.nonzero(tokens == tokenizer.eos_id)
        return tokenizer.decode(tokens[: ends[0]] if ends.size else tokens)

    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return Task(
        train=train if isinstance(train, StreamedRows) else make_rows(train, config.length, tokenizer.eos_id),
        held_out=make_rows(held_out, config.length, tokenizer.eos_id),
        identity=identity | {"tokenizer": tokenizer.digest},
        prompt=np.concatenate([opening, tokenizer.encode(config.sample.prompt)]).astype(np.int32),
        render=render,
        tokenizer=tokenizer,
        targets_per_byte=held_out.targets_per_byte,
    )


def recall_task(config: ConfigDict) -> Task:
    """Random strings that repeat after a gap."""
    data = config.data
    sizes = {key: data[key] for key in ("symbols", "repeat", "fillers", "gap")} | {
        "seed": config.seed,
        "length": config.length,
    }
    train = recall.RecallRows(split="train", num_rows=data.train_rows, graded=data.graded, **sizes)
    check_vocabulary(config, train.num_tokens)
    held_out = recall.RecallRows(split="held_out", num_rows=data.held_out_rows, graded=False, **sizes)
    example = held_out[0]
    (repeat,) = np.nonzero((example["weights"] > 0) & (example["segment_ids"] == 1))
    return Task(
        train=train,
        held_out=held_out,
        identity={"digest": train.digest(), "train_rows": len(train), "held_out_rows": len(held_out)},
        prompt=example["tokens"][: repeat[0] + 1],
        render=lambda tokens: " ".join(str(token) for token in tokens),
        truth=example["targets"][repeat],
    )


def check_vocabulary(config: ConfigDict, num_tokens: int) -> None:
    """Raises UserError where the model has fewer tokens than the data."""
    if config.model.vocab_size < num_tokens:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is too small: the data has tokens up to {num_tokens - 1}"
        )


def make_task(config: ConfigDict, report: Callable[[str], None]) -> Task:
    """The task of `config.data`; `report` is told what takes time. Raises UserError for all that the user can mend."""
    source = config.data.source
    if source == "recall":
        return recall_task(config)
    if source not in text.READERS:
        raise UserError(f"unknown data.source {source!r}; {nearest(source, [*text.READERS, 'recall'])}")
    for key, reader in SOURCE_OF.items():
        if config.data[key] and source != reader:
            raise UserError(
                f"data.{key}={config.data[key]!r} would not be read: data.source is {source!r}; set "
                f"data.source={reader}, or leave data.{key} out"
            )
    return text_task(config, text.READERS[source], report)
