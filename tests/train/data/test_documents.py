"""Documents out of files: each format, and what is said of a damaged one."""

import gzip
import hashlib
import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from train.data.documents import digest_inputs, find_inputs, read_documents, without_twins
from train.errors import UserError

TEXTS = ["first\r\n", "second é", "third\n\nwith lines"]


def write(path, texts=TEXTS):
    """The texts as a file of the format that its name says."""
    table = datasets.Dataset.from_dict({"n": list(range(len(texts))), "text": texts})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffixes[-2:]:
        case [*_, ".jsonl"]:
            path.write_bytes(lines)
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress(lines))
        case [*_, ".parquet"]:
            table.to_parquet(str(path))
        case [*_, ".arrow"]:
            table.save_to_disk(str(path.parent / "saved"))
            (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
        case _:
            path.write_bytes(texts[0].encode())


def read(path, text_key="text"):
    return list(read_documents(find_inputs("data.paths", str(path)), text_key))


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_every_format_has_its_texts_unchanged(tmp_path, name):
    write(tmp_path / name)
    assert read(tmp_path / name) == [(f"{name}:{number}", text) for number, text in enumerate(TEXTS, 1)]


def test_a_plain_file_is_one_document_and_keeps_its_bytes(tmp_path):
    (tmp_path / "a.md").write_bytes(b"x\r\n\xff")
    ((name, text),) = read(tmp_path / "a.md")
    assert name == "a.md"
    assert text.encode("utf-8", "surrogateescape") == b"x\r\n\xff"


def test_directories_and_patterns(tmp_path):
    for name in ("d/b.txt", "d/deep/a.txt", "d/c.jsonl", "d/.hidden/x.txt", "d/.x", "e/z.txt", "e/b.txt"):
        write(tmp_path / name)
    (tmp_path / "d/empty.txt").touch()
    assert [entry.name for entry in find_inputs("k", str(tmp_path / "d"))] == [
        "b.txt", "c.jsonl", "deep/a.txt", "empty.txt",
    ]  # fmt: skip
    both = find_inputs("k", f"{tmp_path}/d/**/*.txt, {tmp_path}/e/z.txt")
    assert [entry.name for entry in both] == ["b.txt", "deep/a.txt", "empty.txt", "z.txt"]
    assert [name for name, _ in read_documents(both, "text")] == ["b.txt", "deep/a.txt", "z.txt"]
    for patterns, message in (
        (f"{tmp_path}/d, {tmp_path}/nothing*", "nothing.*' is no file, no directory with files, and no pattern"),
        (f"{tmp_path}/d, {tmp_path}/e/b.txt", "have one name, 'b.txt'"),
        (" , ", "k is empty: give files"),
    ):
        with pytest.raises(UserError, match=message):
            find_inputs("k", patterns)


def test_digest_is_of_names_and_contents_not_of_places(tmp_path):
    for name in ("one/a.txt", "two/a.txt", "three/b.txt"):
        write(tmp_path / name)
    digests = [digest_inputs(find_inputs("k", str(tmp_path / name))) for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "two/a.txt").write_text("other")
    assert digest_inputs(find_inputs("k", str(tmp_path / "two"))) != digests[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut o', "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not JSON .*utf-8"),
        (b'["text"]', "line 3 holds a list, not an object"),
        (b'{"body": "x"}', r"line 3 has no key 'text' \(it has 'body'\): set data.text_key"),
        (b'{"text": 3}', "line 3: its 'text' is a int, not a string"),
        (b'{"text": ' + b"[" * 100_000, "line 3 nests its JSON too deeply"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
    with pytest.raises(UserError, match=f"a.jsonl {message}"):
        read(tmp_path / "a.jsonl")


def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path):
    """The halves from DC80 to DCFF too, which stand for bytes that are no UTF-8 in text that was read from a file."""
    for name, escape in (("high", "\\ud83d"), ("low", "\\udc80"), ("both", "\\ud83d\\ude00")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "a {escape} z"}}')
    texts = dict(read(tmp_path))
    assert texts == {"both.jsonl:1": "a \U0001f600 z", "high.jsonl:1": "a \ufffd z", "low.jsonl:1": "a \ufffd z"}


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "\ufeffline"}\n', encoding="utf-8-sig")
    assert read(tmp_path) == [("a.txt", "text"), ("b.jsonl:1", "\ufeffline")]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_is_not_utf_8_is_named(tmp_path, name):
    offsets = pyarrow.py_buffer(np.array([0, 2, 4], np.int32).tobytes())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"ok\xff\xfe")])
    table = pyarrow.table({"text": column})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    documents = read_documents(find_inputs("data.paths", str(tmp_path)), "text")
    assert next(documents) == (f"{name}:1", "ok")
    with pytest.raises(UserError, match=f"{name} row 2: its 'text' is not UTF-8 .*0xff"):
        next(documents)


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9.jsonl.gz", b"caf\xe9.parquet", b"caf\xe9.arrow"])
def test_a_file_name_that_is_no_utf_8(tmp_path, name):
    write(tmp_path / os.fsdecode(name))
    inputs = find_inputs("data.paths", f"{tmp_path}/caf*")
    expected = hashlib.sha256(inputs[0].path.read_bytes()).hexdigest()
    description = name + f"\0{inputs[0].path.stat().st_size}\0{expected}\0".encode()
    assert digest_inputs(inputs) == hashlib.sha256(description).hexdigest()
    assert next(text for _, text in read_documents(inputs, "text")) == TEXTS[0]


def test_a_file_under_several_names_is_read_once(tmp_path):
    for name in ("d/sub/a.txt", "d/sub/b.txt"):
        write(tmp_path / name, [name])
    (tmp_path / "d/link.txt").symlink_to("sub/b.txt")
    (tmp_path / "d/hard.txt").hardlink_to(tmp_path / "d/sub/b.txt")
    (tmp_path / "d/loop").symlink_to(".")
    for patterns in (f"{tmp_path}/d,{tmp_path}/d/sub", f"{tmp_path}/d/sub,{tmp_path}/d"):
        once = without_twins(find_inputs("k", patterns))
        assert [entry.name for entry in once] == ["a.txt", "b.txt"]
        assert sorted(text for _, text in read_documents(once, "text")) == ["d/sub/a.txt", "d/sub/b.txt"]


def test_paths_are_taken_as_they_are_written(tmp_path, monkeypatch):
    write(tmp_path / "set[1]/a.txt")
    write(tmp_path / "set1/b.txt")
    (tmp_path / "set[1]/[x].txt").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in ("~/set[1]/*.txt", "~/set[1]", f"{tmp_path}/set[1]/?x].txt,{tmp_path}/set[1]/a.txt"):
        assert [entry.name for entry in find_inputs("k", pattern)] == ["[x].txt", "a.txt"]
    assert [entry.name for entry in find_inputs("k", f"{tmp_path}/set[12]/*")] == ["set1/b.txt"]
    (tmp_path / "set1/c.txt").symlink_to("gone")
    for pattern, message in (
        ("~/set1", r"k: .*set1/c\.txt is a link to nothing: bring back"),
        ("~/" + "x" * 300, r"k: cannot read '.*xxx': File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            find_inputs("k", pattern)


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "d/closed/a.txt")
    write(tmp_path / "d/b.txt")
    access = os.access
    # The tests may run as root, who may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "d/closed" and access(path, mode))
    with pytest.raises(UserError, match=r"k: the directory .*d/closed may not be read"):
        find_inputs("k", str(tmp_path / "d"))


def test_a_name_of_two_lines_makes_no_message_of_two_lines(tmp_path):
    (tmp_path / "a\nb.jsonl").write_text("no JSON")
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert "a\\nb.jsonl line 1 is not JSON" in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    for name, message in (
        ("a.jsonl.gz", r"a.jsonl.gz line \d+: the compressed data is damaged"),
        ("a.parquet", "a.parquet cannot be read after row 0"),
        ("a.arrow", "a.arrow cannot be read after row 0"),
    ):
        write(tmp_path / name, [f"text {number}" * 50 for number in range(200)])
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    write(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet has no key 'body' \(it has 'n', 'text'\)"):
        read(tmp_path / "b.parquet", "body")


@pytest.mark.parametrize("change", ["shrinks", "vanishes"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, change):
    path = tmp_path / "a.jsonl"
    write(path, ["x" * 100_000] * 20)
    documents = read_documents(find_inputs("k", str(tmp_path)), "text")
    next(documents)
    if change == "shrinks":
        with path.open("r+b") as file:
            file.truncate(1_500_000)
    else:
        path.unlink()
    with pytest.raises(
        UserError, match=r"a.jsonl (changed while it was read|line \d+ is not JSON)|cannot read .*a.jsonl"
    ):
        list(documents)
