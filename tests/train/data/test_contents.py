"""The contents of files: compressed text is read through, and what is no text is named, not trained on."""

import bz2
import gzip
import lzma

import pytest

from train.data.corpus import read_corpus
from train.data.documents import find_inputs, read_documents
from train.errors import UserError

TEXT = "a\r\nb é\n"
JSON = b'{"text": "one"}\n{"text": "two"}\n'


def read(path):
    return list(read_documents(find_inputs("data.paths", str(path)), "text"))


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.txt.gz", gzip.compress),
        ("a.TXT.BZ2", bz2.compress),
        ("a.xz", lzma.compress),
        ("a.txt.lzma", lambda content: lzma.compress(content, lzma.FORMAT_ALONE)),
        ("gzip-by-its-first-bytes.txt", gzip.compress),
        ("bzip2-by-its-first-bytes", bz2.compress),
        ("xz-by-its-first-bytes.md", lzma.compress),
    ],
)
def test_compressed_text_is_read_as_its_text(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(TEXT.encode()))
    assert read(tmp_path / name) == [(name, TEXT)]


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.jsonl", gzip.compress),
        ("a.JSONL", bytes),
        ("a.ndjson", bytes),
    ],
)
def test_json_lines_under_other_names_are_read_line_by_line(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(JSON))
    assert read(tmp_path / name) == [(f"{name}:1", "one"), (f"{name}:2", "two")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.zst", b"x", "a.txt.zst has the suffix of a format that is not read: decompress it, or compress"),
        ("a.jsonl.ZIP", b"x", "a.jsonl.ZIP has the suffix of a format that is not read"),
        ("a.txt", b"\x28\xb5\x2f\xfd1", "a.txt is compressed by zstd: decompress it"),
        ("a", b"PK\x03\x04", "a is an archive: unpack it"),
        ("a.txt", b"%PDF-1.7", "a.txt is a PDF: extract its text"),
        ("a.txt", b"\xff\xd8\xff\xe0", "a.txt is an image: leave it out"),
        ("a.txt", "x中".encode("utf-16"), "a.txt is UTF-16: convert it to UTF-8"),
        ("a.txt", b"text\0text", "a.txt is no text: its byte 4 is NUL; leave it out"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a.txt is what Git LFS keeps in place of the file"),
        ("a.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "a.gz is compressed: decompress it"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "a.txt.gz: its compressed data is damaged"),
        ("a.txt.gz", b"plain text", "a.txt.gz: its compressed data is damaged .Not a gzipped file"),
        ("a.txt.xz", lzma.compress(b"x" * 99)[:-9], "a.txt.xz: its compressed data is damaged"),
        ("a.txt.bz2", b"plain text", "cannot read .*a.txt.bz2: Invalid data stream"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_of_the_corpus_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.py").write_bytes(gzip.compress(b"x = 1"))
    with pytest.raises(UserError, match=r"a.py is compressed: decompress it, .* for data\.source=files"):
        read_corpus(str(tmp_path), ".py", 5)
