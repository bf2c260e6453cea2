"""From text to tokens and back: bytes, a Hugging Face `tokenizer.json`, a SentencePiece model, or tokens' numbers.

The tokenizer of a run is `data.tokenizer`: "bytes", "ids:N", or the path of a file. The file is copied into the workdir
and its digest is recorded there, so that what was trained can be sampled from with nothing but the workdir.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.errors import UserError, import_extra, one_line
from train.workdir import replace

IDS = "ids:"  # what `data.tokenizer` starts with where tokens are numbers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A tokenizer.json does not say which of its tokens opens or closes a document; these are the names in use.
EOS_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")


class Tokenizer(Protocol):
    """What the training, and whoever samples, needs of a tokenizer.

    `eos_id` closes every document and `bos_id`, where there is one, opens it; `encode` adds neither. Ids are from 0 to
    `vocab_size` - 1. `digest` is of everything that decides what a text becomes.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    digest: str

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, int32 [T]. Raises UserError where the text has bytes that the tokenizer cannot take."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`: special ones are dropped, what is no valid text shows as U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, and one token more that ends a document."""

    name = "bytes"
    vocab_size = 257
    bos_id = None
    eos_id = 256
    digest = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """The bytes of `text`; those that were no UTF-8 when it was read (surrogate escapes) come back as they were."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the bytes; ids above `eos_id`, which a model with a larger vocabulary has, show as U+FFFD."""
        # 255 is in no valid UTF-8.
        content = bytes(min(int(token), 255) for token in ids if token != self.eos_id)
        return content.decode("utf-8", "replace")


class IdTokenizer:
    """A text is the numbers of its tokens, with white space between: for models that come without a tokenizer."""

    def __init__(self, spec: str, eos_token: str | None, bos_token: str | None):
        """`spec` is "ids:N", with tokens from 0 to N - 1; the special ones are numbers too, N - 1 ends a document.

        Raises UserError where one of them is no such number.
        """
        size = spec.removeprefix(IDS)
        if not (size.isascii() and size.isdecimal() and 1 <= int(size) < 2**31):
            raise UserError(f"data.tokenizer={spec!r} must be 'ids:N', N the number of tokens, such as 'ids:32000'")
        self.name, self.vocab_size = spec, int(size)
        self.eos_id = self.vocab_size - 1 if eos_token is None else self._token("data.eos_token", eos_token)
        self.bos_id = None if bos_token is None else self._token("data.bos_token", bos_token)
        self.digest = f"{spec}:{self.eos_id}:{self.bos_id}"

    def encode(self, text: str) -> np.ndarray:
        """The numbers in `text`. Raises UserError for what is none, or no token."""
        return np.array([self._token("a document's token", word) for word in text.split()], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The numbers, without those of `eos_id` and `bos_id`."""
        return " ".join(str(int(token)) for token in ids if token not in (self.eos_id, self.bos_id))

    def _token(self, name: str, word: str) -> int:
        if not (word.isascii() and word.isdecimal() and int(word) < self.vocab_size):
            raise UserError(
                f"{name} is {word[:40]!r}: data.tokenizer={self.name!r} takes numbers from 0 to {self.vocab_size - 1}, "
                "with white space between them"
            )
        return int(word)


class HuggingFaceTokenizer:
    """A `tokenizer.json`. `eos_token` and `bos_token` name its special tokens; None takes the first known name."""

    def __init__(self, path: Path, eos_token: str | None, bos_token: str | None):
        """Raises UserError where the file is none, or has no such token."""
        tokenizers = import_extra("tokenizers", "data")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The package raises bare Exceptions.
            raise UserError(f"tokenizer {str(path)!r} is no tokenizer.json: {one_line(error)}") from error
        altered = _encode_whole(self._tokenizer)
        # Otherwise a document that mentions "</s>" would end there.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = path.name
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = _special("data.eos_token", eos_token, EOS_TOKENS, vocabulary, path)
        self.bos_id = _special("data.bos_token", bos_token, BOS_TOKENS, vocabulary, None if bos_token is None else path)
        # Runs and caches that were made while these were in force hold other tokens.
        self.digest = _digest(path, self.eos_id, self.bos_id) + "".join(f" without {name}" for name in altered)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without special ones."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        _check_unicode(texts, self.name)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`."""
        return _decode_known(ids, self.vocab_size, self._tokenizer.decode)


class SentencePieceTokenizer:
    """A SentencePiece `.model`, such as Llama 2's, which the paper uses."""

    def __init__(self, path: Path):
        """Raises UserError where the file is none, or has no token that ends a document."""
        sentencepiece = import_extra("sentencepiece", "data")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {str(path)!r} is no SentencePiece model: {one_line(error)}") from error
        self.name = path.name
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        if self.eos_id < 0:
            raise UserError(f"tokenizer {str(path)!r} has no end-of-sentence token: train it with one")
        self.digest = _digest(path, self.eos_id, self.bos_id)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without special ones."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        _check_unicode(texts, self.name)
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts), out_type=int, num_threads=-1)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`."""
        return _decode_known(ids, self.vocab_size, self._processor.decode)


def load_tokenizer(spec: str, eos_token: str | None = None, bos_token: str | None = None) -> Tokenizer:
    """The tokenizer "bytes", "ids:N", or that of a file: `.model` is SentencePiece, `.json` Hugging Face.

    Raises UserError for anything else, a file that cannot be read, and an extra that is not installed.
    """
    path = _path(spec)
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith(IDS):
        return IdTokenizer(spec, eos_token, bos_token)
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"data.tokenizer={spec!r} must be 'bytes', a tokenizer.json, a SentencePiece .model file, or 'ids:N'"
        )
    if not os.path.isfile(path):
        raise UserError(f"there is no tokenizer file {spec!r}")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eos_token, bos_token)
    if eos_token is not None or bos_token is not None:
        raise UserError(
            "data.eos_token and data.bos_token are for a tokenizer.json: a SentencePiece model names its own"
        )
    return SentencePieceTokenizer(path)


def keep_tokenizer(spec: str, workdir: Path) -> None:
    """Copies the file of `data.tokenizer` into the workdir (there is none for bytes and numbers)."""
    if has_file(spec):
        replace(kept_path(spec, workdir), _path(spec).read_bytes())


def load_kept_tokenizer(data: Any, workdir: Path) -> Tokenizer:
    """The tokenizer of the run in `workdir`, from its own copy; `data` is the mapping "data" of its config.json.

    Raises UserError where the copy is missing or is not the one that the run was trained with.
    """
    if "tokenizer" not in data:
        raise UserError(f"the run in {workdir} has no tokenizer: its data.source={data['source']!r} is no text")
    spec = data["tokenizer"]
    tokenizer = load_tokenizer(
        str(kept_path(spec, workdir)) if has_file(spec) else spec, data["eos_token"], data["bos_token"]
    )
    try:
        trained = json.loads((workdir / "corpus.json").read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / 'corpus.json'} does not say which tokenizer the run was trained with") from error
    # What is turned off in a tokenizer.json changes the tokens of a text, not the meaning of a token.
    if tokenizer.digest.partition(" ")[0] != str(trained).partition(" ")[0]:
        raise UserError(
            f"tokenizer mismatch: {workdir} was trained with one of digest {trained}, its tokenizer file has "
            f"{tokenizer.digest}"
        )
    return tokenizer


def has_file(spec: str) -> bool:
    """Whether the tokenizer `spec` of a configuration is a file."""
    return spec != "bytes" and not spec.startswith(IDS)


def _path(spec: str) -> Path:
    return Path(os.path.expanduser(spec))  # Path.expanduser raises where there is no such user


def kept_path(spec: str, workdir: Path) -> Path:
    """Where a run keeps its copy of the tokenizer file `spec`."""
    return workdir / f"tokenizer{Path(spec).suffix}"


def _encode_whole(tokenizer: Any) -> list[str]:
    """Turns off what a tokenizer.json may carry from its own training; returns the names of what was on.

    Truncation cuts documents off, padding fills them up to the longest of a batch, and the dropout of a BPE makes other
    tokens of the same text each time.
    """
    altered = []
    if tokenizer.truncation is not None:
        tokenizer.no_truncation()
        altered.append("truncation")
    if tokenizer.padding is not None:
        tokenizer.no_padding()
        altered.append("padding")
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
        altered.append("dropout")
    return altered


def _digest(path: Path, eos_id: int, bos_id: int | None) -> str:
    return hashlib.sha256(path.read_bytes() + f"\0{eos_id}\0{bos_id}".encode()).hexdigest()


def _special(
    key: str, name: str | None, known: Sequence[str], vocabulary: dict[str, int], required_in: Path | None
) -> int | None:
    names = known if name is None else (name,)
    found = next((vocabulary[token] for token in names if token in vocabulary), None)
    if found is None and required_in is not None:
        raise UserError(f"tokenizer {str(required_in)!r} has no token {' or '.join(map(repr, names))}: set {key}")
    return found


def _check_unicode(texts: Sequence[str], name: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            start = text[: error.start].count("\n") + 1
            raise UserError(
                f"a document is not UTF-8 (in its line {start}), which {name} cannot encode: it starts with "
                f"{text[:40]!r}; convert it, or use data.tokenizer=bytes"
            ) from error


def _decode_known(ids: Sequence[int] | np.ndarray, vocab_size: int, decode: Callable[[list[int]], str]) -> str:
    """Decodes `ids`; those outside the vocabulary, which a model with a larger one has, show as U+FFFD."""
    ids = np.asarray(ids, np.int64)
    (unknown,) = np.nonzero(ids >= vocab_size)
    pieces = np.split(ids, np.sort(np.concatenate([unknown, unknown + 1])))
    # Every second piece is one unknown id.
    return "".join(REPLACEMENT if number % 2 else decode(piece.tolist()) for number, piece in enumerate(pieces))
