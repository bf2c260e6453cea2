"""The sources of text: from a configuration to a training and a held-out split, and what identifies them."""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from train.data import hugging_face
from train.data.contents import decode_text
from train.data.corpus import read_corpus
from train.data.documents import digest_inputs, find_inputs, read_documents, without_twins
from train.data.held_out import hold_out
from train.data.stream import Source, StreamedRows
from train.data.tokenized import Split, open_cache, tokenize_in_memory
from train.data.tokenizers import Tokenizer
from train.errors import UserError

Splits = tuple[Split | StreamedRows, Split, dict[str, Any]]
Reader = Callable[[ConfigDict, Tokenizer, Callable[[str], None]], Splits]


def read_default_corpus(config: ConfigDict, tokenizer: Tokenizer, report: Callable[[str], None]) -> Splits:
    """Source files of `data.root`, in memory."""
    data = config.data
    corpus = read_corpus(data.root, data.suffix, data.held_out_percent)
    documents = [(held_out, part) for held_out in (False, True) for part in (corpus.train, corpus.held_out)[held_out]]
    decoded = ((held_out, decode_text(bytes(document))) for held_out, document in documents)
    return _identified(config, corpus.digest, *tokenize_in_memory(decoded, tokenizer))


def read_files(config: ConfigDict, tokenizer: Tokenizer, report: Callable[[str], None]) -> Splits:
    """Files of `data.paths` and, as the held-out split if given, of `data.held_out_paths`; through the cache."""
    data = config.data
    found = find_inputs("data.paths", data.paths)
    train, held_out = without_twins(found), []
    if data.held_out_paths is not None:
        held_out = without_twins(find_inputs("data.held_out_paths", data.held_out_paths))
        both = {one.file: one.path for one in train}
        for one in held_out:
            if one.file in both:
                raise UserError(
                    f"{both[one.file]} is in data.paths and in data.held_out_paths: it would be trained on; take it "
                    "out of one of them"
                )

    def documents() -> Iterator[tuple[bool, str]]:
        documents = read_documents(train, data.text_key)
        if held_out:
            yield from ((False, text) for _, text in documents)
            yield from ((True, text) for _, text in read_documents(held_out, data.text_key))
        else:
            yield from hold_out(documents, data.held_out_percent)

    size = sum(one.stamp[0] for one in train + held_out) / 1e6
    twins = f"; {len(found) - len(train)} more names of the same files" if len(found) > len(train) else ""
    report(f"reading {len(train) + len(held_out)} files, {size:,.1f} MB{twins}")
    key = {
        "train": digest_inputs(train),
        "held_out": digest_inputs(held_out) if held_out else data.held_out_percent,
        "text_key": data.text_key,
    }
    splits = open_cache(_cache(data), key, documents, tokenizer, report)
    return _identified(config, f"{key['train']}, {key['held_out']}", *splits)


def read_hugging_face(config: ConfigDict, tokenizer: Tokenizer, report: Callable[[str], None]) -> Splits:
    """`data.dataset`, tokenised once through the cache, or streamed."""
    data = config.data
    hugging_face.check_splits(data)
    digest = hugging_face.identify(data)
    if data.streaming:
        return _identified(config, digest, *_streamed(config, tokenizer))

    def documents() -> Iterator[tuple[bool, str]]:
        documents = hugging_face.read_stream(hugging_face.load_stream(data, data.split), data.dataset, data.text_key)
        if data.held_out_split is None:
            yield from hold_out(((f"{data.split}:{number}", text) for number, text in documents), data.held_out_percent)
        else:
            yield from ((False, text) for _, text in documents)
            stream = hugging_face.load_stream(data, data.held_out_split)
            yield from ((True, text) for _, text in hugging_face.read_stream(stream, data.dataset, data.text_key))

    keys = ("subset", "split", "held_out_split", "held_out_percent", "text_key")
    key = {"dataset": digest} | {name: data[name] for name in keys}
    return _identified(config, digest, *open_cache(_cache(data), key, documents, tokenizer, report))


def _cache(data: ConfigDict) -> Path:
    return Path(os.path.expanduser(data.cache_dir))


def _streamed(config: ConfigDict, tokenizer: Tokenizer) -> tuple[StreamedRows, Split]:
    """The rest of the stream, after its first documents are held out; or all of it, and the first of another split."""
    data = config.data
    stream = hugging_face.load_stream(data, data.split)
    held_out = stream if data.held_out_split is None else hugging_face.load_stream(data, data.held_out_split)
    origin = stream.state_dict()
    first = islice(hugging_face.read_stream(held_out, data.dataset, data.text_key), data.held_out_documents)
    _, split = tokenize_in_memory(((True, text) for _, text in first), tokenizer)
    if data.held_out_split is None:
        origin = stream.state_dict()
    source = Source(stream, origin, data.dataset, data.text_key, tokenizer)
    return StreamedRows(source, data.packing, config.length, data.shuffle_rows, config.seed), split


def _identified(config: ConfigDict, digest: str, train: Split | StreamedRows, held_out: Split) -> Splits:
    """The splits with their digest and sizes. Raises UserError where one of them is empty."""
    data = config.data
    identity: dict[str, Any] = {"digest": digest}
    for name, described, split in (("train", "training", train), ("held_out", "held-out", held_out)):
        if isinstance(split, StreamedRows):
            continue
        if not len(split):
            raise UserError(
                f"the {described} split has no document: change data.held_out_percent={data.held_out_percent}, or name "
                "its own data (docs/data.md)"
            )
        identity[f"{name}_documents"] = len(split)
        identity[f"{name}_tokens"] = int(split.tokens.size)
        identity[f"{name}_bytes"] = split.num_bytes
        if data.packing == "documents":
            # What is behind the last target of a row is never seen.
            cut = np.maximum(np.diff(split.starts) - (config.length + 1), 0)
            identity[f"{name}_tokens_cut_off"] = int(cut.sum())
    return train, held_out, identity


READERS: dict[str, Reader] = {"corpus": read_default_corpus, "files": read_files, "huggingface": read_hugging_face}
