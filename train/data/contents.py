"""From the bytes of a file to its text: what is compressed is read through, what is no text is refused by its name.

What gzip, bzip2 and xz have compressed is told by the name or by the first bytes. The rest that is no text is told by
its first bytes too, by NUL bytes, which no text has, and by the name where a format may have neither.
"""

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from train.errors import UserError

COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open,
}  # fmt: skip
SIGNATURES = {
    re.compile(rb"\x1f\x8b\x08"): gzip.open,
    # The digits of pi open a block, those of its square root the end of an empty file.
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.open,
    re.compile(rb"\xfd7zXZ\0"): lzma.open,
}
LONGEST_SIGNATURE = 16

# Besides OSError: what a damaged or cut file raises.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)

UNREADABLE_SUFFIXES = frozenset([".zst", ".zstd", ".zip", ".7z", ".rar", ".lz4", ".br", ".z", ".lzo", ".sz"])
DECOMPRESS = "decompress it, or compress it with gzip, bzip2 or xz"
NOT_TEXT = {
    re.compile(rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\0"): f"compressed: {DECOMPRESS}, once, for data.source=files",
    re.compile(rb"\x28\xb5\x2f\xfd"): f"compressed by zstd: {DECOMPRESS}",
    re.compile(rb"\x04\x22\x4d\x18"): f"compressed by lz4: {DECOMPRESS}",
    re.compile(rb"\x1f[\x9d\xa0]"): f"compressed by compress: {DECOMPRESS}",
    re.compile(rb"PK(\x03\x04|\x05\x06)|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"): "an archive: unpack it",
    re.compile(rb"%PDF-"): "a PDF: extract its text",
    re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*"): "an image: leave it out",
    re.compile(rb"\xff\xfe|\xfe\xff"): "UTF-16: convert it to UTF-8",
    re.compile(rb"version https://git-lfs\.github\.com/spec/"): "what Git LFS keeps in place of the file: git lfs pull",
}


def open_decompressed(path: Path) -> BinaryIO:
    """The file, opened for reading its bytes as they were before gzip, bzip2 or xz.

    Raises UserError where its name is that of a format that cannot be read.
    """
    if path.suffix.lower() in UNREADABLE_SUFFIXES:
        raise UserError(f"{path} has the suffix of a format that is not read: {DECOMPRESS}, or leave it out")
    opener = COMPRESSIONS.get(path.suffix.lower())
    if opener is None:
        with path.open("rb") as file:
            first = file.read(LONGEST_SIGNATURE)
        opener = next((opener for signature, opener in SIGNATURES.items() if signature.match(first)), open)
    return opener(path, "rb")


def without_compression(path: Path) -> Path:
    """The path that the file had before it was compressed."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def check_text(content: bytes, where: str) -> None:
    """Raises UserError saying what `content` is where it is no text; `where` names the file."""
    for signature, kind in NOT_TEXT.items():
        if signature.match(content):
            raise UserError(f"{where} is {kind}")
    position = content.find(0)
    if position >= 0:
        raise UserError(f"{where} is no text: its byte {position} is NUL; leave it out")


def decode_text(content: bytes) -> str:
    """The text of UTF-8 bytes without the byte order mark; line ends stay, and bytes that are no UTF-8 are escapes.

    Everything that reads text has it from here, so a prompt has the tokens that training would see.
    """
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """The bytes of a file's name, which need not be UTF-8: what a digest or a hash of it is of."""
    return name.encode("utf-8", "surrogateescape")
