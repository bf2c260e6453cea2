"""Documents out of local files: plain text, JSON lines, Parquet, and Arrow as Hugging Face datasets keep it.

A plain file is one document; a line or row of the others is one, the text under `text_key`. What is damaged is named
with its file and line. The name of a document is its file's and its line's, so a split by a hash of names, as in
train/corpus.py, leaves it where it is whatever comes or goes around it.
"""

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError, import_extra, one_line


@dataclass(frozen=True)
class Input:
    """A file, and its name relative to the pattern that it was found by: the same wherever the whole is moved to.

    `stamp` is its size and the time of its last change when it was found.
    """

    path: Path
    name: str
    stamp: tuple[int, int]


def find_inputs(key: str, patterns: str) -> list[Input]:
    """The files of comma-separated paths and patterns (`**` crosses directories), sorted by name.

    A directory stands for all files below it whose path has no part that starts with a dot. Raises UserError naming
    `key` where a pattern finds nothing, or two files have one name.
    """
    found: dict[str, Path] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        path = Path(pattern)
        if path.is_file():
            root, names = path.parent, [path.name]
        elif path.is_dir():
            root, names = path, glob.glob("**", root_dir=path, recursive=True)
        else:
            # The part before the first wildcard is the root.
            parts = path.parts
            fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
            root = Path(*parts[:fixed])
            names = glob.glob(str(Path(*parts[fixed:])), root_dir=root, recursive=True) if fixed < len(parts) else []
        names = [name for name in names if (root / name).is_file()]
        if not names:
            raise UserError(f"{key}: {pattern!r} is no file, no directory with files, and no pattern of any")
        for name in sorted(names):
            if found.setdefault(name, root / name) != root / name:
                raise UserError(f"{key}: {found[name]} and {root / name} have one name, {name!r}: name their directory")
    if not found:
        raise UserError(f"{key} is empty: give files, directories or patterns, separated by commas")
    return [Input(found[name], name, _stamp(found[name])) for name in sorted(found)]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def digest_inputs(inputs: list[Input]) -> str:
    """SHA-256 of the names, sizes and contents of `inputs`."""
    digest = hashlib.sha256()
    for entry in inputs:
        try:
            with entry.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{entry.name}\0{file.tell()}\0{content}\0".encode())
        except OSError as error:
            raise UserError(f"cannot read {entry.path}: {error.strerror}") from error
    return digest.hexdigest()


def read_documents(inputs: list[Input], text_key: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that is not empty, in order. Bytes that are no UTF-8 are surrogate escapes.

    Raises UserError for a file, a line or a row that cannot be read, and for a file that has changed, naming it.
    """
    for entry in inputs:
        try:
            for number, text in _reader(entry.path)(entry.path, text_key):
                if text:
                    yield (entry.name if number is None else f"{entry.name}:{number}"), text
            if _stamp(entry.path) != entry.stamp:
                raise UserError(f"{entry.path} changed while it was read: run again when nothing writes to it")
        except OSError as error:
            raise UserError(f"cannot read {entry.path}: {error.strerror or one_line(error)}") from error


Reader = Callable[[Path, str], Iterator[tuple[int | None, str]]]


def _reader(path: Path) -> Reader:
    suffixes = path.suffixes[-2:]
    if suffixes[-1:] == [".jsonl"] or suffixes == [".jsonl", ".gz"]:
        return _read_json_lines
    return {".parquet": _read_parquet, ".arrow": _read_arrow}.get(path.suffix, _read_text)


def _read_text(path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    yield None, path.read_bytes().decode("utf-8", "surrogateescape")


def _read_json_lines(path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, text_of(_parse(line, path, number), text_key, f"{path} line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} line {number + 1}: the gzip data is damaged ({one_line(error)})") from error


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too.
        raise UserError(f"{path} line {number} is not JSON ({one_line(error)})") from error


def _read_parquet(path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    import_extra("pyarrow", "data")
    parquet = import_extra("pyarrow.parquet", "data")
    yield from _read_rows(path, text_key, lambda: parquet.ParquetFile(path).iter_batches(batch_size=1024))


def _read_arrow(path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    pyarrow = import_extra("pyarrow", "data")
    yield from _read_rows(path, text_key, lambda: pyarrow.ipc.open_stream(str(path)))


def _read_rows(path: Path, text_key: str, batches: Callable[[], Any]) -> Iterator[tuple[int | None, str]]:
    arrow = import_extra("pyarrow", "data")
    number = 0
    try:
        for batch in batches():
            if text_key not in batch.schema.names:
                text_of(dict.fromkeys(batch.schema.names), text_key, str(path))
            for value in batch.column(text_key).to_pylist():
                number += 1
                yield number, text_of({text_key: value}, text_key, f"{path} row {number}")
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read after row {number} ({one_line(error)})") from error


def text_of(record: Any, text_key: str, where: str) -> str:
    """The text of one record; raises UserError naming `where` it is if it has none."""
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise UserError(f"{where} has no key {text_key!r} (it has {', '.join(map(repr, record))}): set data.text_key")
    if not isinstance(record[text_key], str):
        raise UserError(f"{where}: its {text_key!r} is a {type(record[text_key]).__name__}, not a string")
    return record[text_key]
