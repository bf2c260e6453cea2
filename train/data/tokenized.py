"""Tokenised documents: in memory, or in a cache on the disk that is made once.

A split is one array of tokens in which each document stands between `bos_id`, where the tokenizer has one, and
`eos_id`, with the positions where documents start. The cache is a directory named by the digest of all that decides its
content; it appears whole or not at all. Its tokens are read when they are needed, by `pread` and not through a memory
map: under a file that shrinks, a map kills the process where a short read can be reported.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.data.tokenizers import Tokenizer
from train.errors import UserError

# Texts that are tokenised at a time: enough to keep all cores at work, a few MB of text.
TEXTS_AT_A_TIME = 512

SPLITS = ("train", "held_out")

# Counts up whenever the same inputs become other documents than before, so that no cache of those before is taken.
READING = 2


class Tokens(Protocol):
    """Tokens by position, as an array has them: `tokens[start:stop]` is an array."""

    size: int

    def __getitem__(self, piece: slice) -> np.ndarray: ...


@dataclass(frozen=True)
class Split:
    """Documents one after another: document i is `tokens[starts[i] : starts[i + 1]]`, `num_bytes` their UTF-8 text."""

    tokens: Tokens
    starts: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        """How many documents."""
        return len(self.starts) - 1

    @property
    def targets_per_byte(self) -> float:
        """Targets (every token of a document but its first) over bytes of text: 1 for byte tokens."""
        return (self.tokens.size - len(self)) / self.num_bytes


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, as little-endian integers of `dtype`."""

    path: Path
    dtype: np.dtype
    size: int
    descriptor: int

    def __getitem__(self, piece: slice) -> np.ndarray:
        """The tokens of `piece`. Raises UserError where the file has become shorter than it was."""
        start, stop, _ = piece.indices(self.size)
        count, width = max(stop - start, 0), self.dtype.itemsize
        content = os.pread(self.descriptor, count * width, start * width)
        if len(content) < count * width:
            raise UserError(
                f"{self.path} has shrunk under the run: delete its directory, and run again to make it anew"
            )
        return np.frombuffer(content, self.dtype)


def tokenize(
    documents: Iterable[tuple[bool, str]], tokenizer: Tokenizer
) -> Iterator[tuple[bool, list[np.ndarray], int]]:
    """Batches of (held out or not, documents with their special tokens, bytes of their text), each split in order."""
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for batch in batched(documents, TEXTS_AT_A_TIME):
        for held_out in (False, True):
            texts = [text for belongs, text in batch if belongs == held_out]
            tokens = tokenizer.encode_batch(texts) if texts else []
            closed = [np.concatenate([opening, one, [tokenizer.eos_id]]).astype(np.int32) for one in tokens]
            yield held_out, closed, sum(len(text.encode("utf-8", "surrogateescape")) for text in texts)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def tokenize_in_memory(documents: Iterable[tuple[bool, str]], tokenizer: Tokenizer) -> tuple[Split, Split]:
    """The training and the held-out split of (held out or not, text)."""
    empty = np.zeros(0, token_dtype(tokenizer))
    pieces: dict[bool, list[np.ndarray]] = {False: [empty], True: [empty]}
    num_bytes = {False: 0, True: 0}
    for held_out, tokens, size in tokenize(documents, tokenizer):
        pieces[held_out] += [one.astype(empty.dtype) for one in tokens]
        num_bytes[held_out] += size
    return tuple(
        Split(np.concatenate(part), np.cumsum([one.size for one in part], dtype=np.int64), num_bytes[held_out])
        for held_out, part in pieces.items()
    )


def open_cache(
    directory: Path,
    key: dict[str, Any],
    documents: Callable[[], Iterable[tuple[bool, str]]],
    tokenizer: Tokenizer,
    report: Callable[[str], None],
) -> tuple[Split, Split]:
    """The training and the held-out split from the cache below `directory`; without one, made from `documents()`.

    `key` is JSON: all that decides the tokens. A damaged cache is said and made again. Raises UserError where the disk
    is full or cannot be written.
    """
    key = key | {"reading": READING, "tokenizer": tokenizer.digest, "dtype": token_dtype(tokenizer).str}
    place = directory / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    damage = find_damage(place)
    if damage is None:
        report(f"tokens from {place}")
        return _open(place)
    try:
        if os.path.exists(place):
            report(f"the token cache {place} is unreadable ({damage}): made again")
            shutil.rmtree(place)
        report(f"tokenising into {place}")
        _write(place, key, documents(), tokenizer)
    except OSError as error:
        raise UserError(f"cannot write the token cache {place}: {error.strerror}; set data.cache_dir") from error
    return _open(place)


def find_damage(place: Path) -> str | None:
    """Why the cache in `place` cannot be used; None where it can."""
    if not os.path.exists(place):  # Path.exists raises where the name is too long
        return "there is none"
    try:
        files = dict(json.loads((place / "cache.json").read_text(encoding="utf-8"))["files"])
        for name, digest in files.items():
            with (place / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def _open(place: Path) -> tuple[Split, Split]:
    description = json.loads((place / "cache.json").read_text(encoding="utf-8"))
    splits = []
    for name in SPLITS:
        starts = np.load(place / f"{name}.starts.npy")
        path = place / f"{name}.tokens"
        descriptor = os.open(path, os.O_RDONLY)  # for as long as the process lives
        tokens = TokenFile(path, np.dtype(description["key"]["dtype"]), int(starts[-1]), descriptor)
        splits.append(Split(tokens, starts, description["bytes"][name]))
    return tuple(splits)


def _write(place: Path, key: dict[str, Any], documents: Iterable[tuple[bool, str]], tokenizer: Tokenizer) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.partial-", dir=place.parent))
    try:
        sizes: dict[str, list[int]] = {name: [0] for name in SPLITS}
        num_bytes = dict.fromkeys(SPLITS, 0)
        with (partial / "train.tokens").open("wb") as train, (partial / "held_out.tokens").open("wb") as held_out:
            for belongs, tokens, size in tokenize(documents, tokenizer):
                name, file = (SPLITS[1], held_out) if belongs else (SPLITS[0], train)
                for one in tokens:
                    file.write(one.astype(token_dtype(tokenizer)).tobytes())
                sizes[name] += [one.size for one in tokens]
                num_bytes[name] += size
            for file in (train, held_out):
                file.flush()
                os.fsync(file.fileno())
        for name in SPLITS:
            np.save(partial / f"{name}.starts.npy", np.cumsum(sizes[name], dtype=np.int64))
        digests = {}
        for path in sorted(partial.iterdir()):
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        content = {"key": key, "bytes": num_bytes, "files": digests}
        (partial / "cache.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        try:
            partial.rename(place)
        except OSError:
            if find_damage(place) is not None:  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
