"""Documents out of local files: plain text, JSON lines, Parquet, and Arrow as Hugging Face datasets keep it.

A plain file is one document; a line or row of the others is one, the text under `text_key`. What is damaged is named
with its file and line, and what is no text with its file. The name of a document is its file's and its line's, so a
split by a hash of names, as in train/data/held_out.py, leaves it where it is whatever comes or goes around it.
"""

import codecs
import errno
import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.data.contents import DAMAGE, check_text, decode_text, encode_name, open_decompressed, without_compression
from train.errors import UserError, import_extra, one_line

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Input:
    """A file, and its name relative to the pattern that it was found by: the same wherever the whole is moved to.

    `stamp` is its size and the time of its last change when it was found. `file` is the same for all names of one
    file: a link, symbolic or hard, or two patterns of which one lies in the other.
    """

    path: Path
    name: str
    stamp: tuple[int, int]
    file: tuple[int, ...]


def find_inputs(key: str, patterns: str) -> list[Input]:
    """The files of comma-separated paths and patterns (`**` crosses directories), sorted by name.

    A directory stands for all files below it whose path has no part that starts with a dot, `~` for the home
    directory. Raises UserError naming `key` where a pattern finds nothing, a link leads nowhere, or two files have one
    name.
    """
    found: dict[str, Path] = {}
    try:
        for pattern in filter(None, (part.strip() for part in patterns.split(","))):
            root, names = _expand(Path(os.path.expanduser(pattern)))
            names = [name for name in names if _is_file(key, root / name)]
            if not names:
                raise UserError(f"{key}: {pattern!r} is no file, no directory with files, and no pattern of any")
            for name in sorted(names):
                other = found.setdefault(name, root / name)
                if other != root / name and not other.samefile(root / name):
                    raise UserError(f"{key}: {other} and {root / name} have one name, {name!r}: name their directory")
        inputs = [input_of(found[name], name) for name in sorted(found)]
    except OSError as error:
        raise UserError(f"{key}: cannot read {error.filename!r}: {error.strerror}") from error
    if not inputs:
        raise UserError(f"{key} is empty: give files, directories or patterns, separated by commas")
    return inputs


def _expand(path: Path) -> tuple[Path, list[str]]:
    """A directory, and the names of what a path or a pattern finds below it."""
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        return path, glob.glob("**", root_dir=path, recursive=True)
    # The part before the first wildcard is the root. What exists as it is written has brackets, no wildcards.
    parts = path.parts
    fixed = 0
    while fixed < len(parts) and (not glob.has_magic(parts[fixed]) or Path(*parts[: fixed + 1]).exists()):
        fixed += 1
    root = Path(*parts[:fixed])
    names = glob.glob(str(Path(*parts[fixed:])), root_dir=root, recursive=True) if fixed < len(parts) else []
    return root, names


def _is_file(key: str, path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UserError(f"{key}: {path} is a link to nothing: bring back what it leads to, or leave it out") from error
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link into a directory above itself, which a pattern follows again and again
            return False
        raise
    if stat.S_ISDIR(mode) and not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{key}: the directory {path} may not be read: a pattern would go past its files in silence")
    return stat.S_ISREG(mode)


def input_of(path: Path, name: str) -> Input:
    """The file at `path` under `name`. Raises OSError where there is none."""
    status = path.stat()
    stamp = status.st_size, status.st_mtime_ns
    # Some network disks give one number to several files, but hardly of one size and time.
    return Input(path, name, stamp, (status.st_dev, status.st_ino, *stamp))


def without_twins(inputs: Iterable[Input]) -> list[Input]:
    """Each file once, under the first of its names."""
    first: dict[tuple[int, ...], Input] = {}
    for entry in inputs:
        first.setdefault(entry.file, entry)
    return list(first.values())


def digest_inputs(inputs: list[Input]) -> str:
    """SHA-256 of the names, sizes and contents of `inputs`."""
    digest = hashlib.sha256()
    for entry in inputs:
        try:
            with entry.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(encode_name(entry.name) + f"\0{file.tell()}\0{content}\0".encode())
        except OSError as error:
            raise UserError(f"cannot read {entry.path}: {error.strerror}") from error
    return digest.hexdigest()


def read_documents(inputs: list[Input], text_key: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that is not empty, in order. Bytes that are no UTF-8 are surrogate escapes.

    Raises UserError for a file, a line or a row that cannot be read, and for a file that has changed, naming it.
    """
    for entry in inputs:
        try:
            with open_decompressed(entry.path) as file:
                for number, text in _reader(entry.path)(file, entry.path, text_key):
                    if text:
                        yield (entry.name if number is None else f"{entry.name}:{number}"), text
            if input_of(entry.path, entry.name).stamp != entry.stamp:
                raise UserError(f"{entry.path} changed while it was read: run again when nothing writes to it")
        except DAMAGE as error:
            raise UserError(f"{entry.path}: its compressed data is damaged ({one_line(error)})") from error
        except OSError as error:
            raise UserError(f"cannot read {entry.path}: {error.strerror or one_line(error)}") from error


Reader = Callable[[BinaryIO, Path, str], Iterator[tuple[int | None, str]]]


def _reader(path: Path) -> Reader:
    suffix = without_compression(path).suffix.lower()
    readers = {
        ".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".parquet": _read_parquet, ".arrow": _read_arrow
    }  # fmt: skip
    return readers.get(suffix, _read_text)


def _read_text(file: BinaryIO, path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    content = file.read()
    check_text(content, str(path))
    yield None, decode_text(content)


def _read_json_lines(file: BinaryIO, path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, text_of(_parse(line, path, number), text_key, f"{path} line {number}")
    except DAMAGE as error:
        raise UserError(f"{path} line {number + 1}: the compressed data is damaged ({one_line(error)})") from error


def _parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too.
        raise UserError(f"{path} line {number} is not JSON ({one_line(error)})") from error
    except RecursionError as error:
        raise UserError(f"{path} line {number} nests its JSON too deeply ({one_line(error)})") from error


def _read_parquet(file: BinaryIO, path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    import_extra("pyarrow", "data")
    parquet = import_extra("pyarrow.parquet", "data")
    yield from _read_rows(path, text_key, lambda: parquet.ParquetFile(file).iter_batches(batch_size=1024))


def _read_arrow(file: BinaryIO, path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    pyarrow = import_extra("pyarrow", "data")
    yield from _read_rows(path, text_key, lambda: pyarrow.ipc.open_stream(file))


def _read_rows(path: Path, text_key: str, batches: Callable[[], Any]) -> Iterator[tuple[int | None, str]]:
    arrow = import_extra("pyarrow", "data")
    number = 0
    try:
        for batch in batches():
            if text_key not in batch.schema.names:
                text_of(dict.fromkeys(batch.schema.names), text_key, str(path))
            for value in batch.column(text_key):
                number += 1
                yield number, text_of({text_key: value.as_py()}, text_key, f"{path} row {number}")
    except UnicodeDecodeError as error:  # Not every writer checks what it calls a string.
        raise UserError(f"{path} row {number}: its {text_key!r} is not UTF-8 ({one_line(error)})") from error
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read after row {number} ({one_line(error)})") from error


def text_of(record: Any, text_key: str, where: str) -> str:
    """The text of one record; raises UserError naming `where` it is if it has none.

    Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is U+FFFD: left alone, some halves would be taken
    for the escapes of bytes that are no UTF-8.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        raise UserError(f"{where} has no key {text_key!r} (it has {', '.join(map(repr, record))}): set data.text_key")
    if not isinstance(record[text_key], str):
        raise UserError(f"{where}: its {text_key!r} is a {type(record[text_key]).__name__}, not a string")
    text = record[text_key]
    try:
        text.encode()  # many times faster than a search
    except UnicodeEncodeError:
        text = LONE_SURROGATE.sub("\ufffd", text)
    return text
