"""Documents out of files: each format, and what is said of a damaged one."""

import gzip
import json

import datasets
import pytest

from train.documents import digest_inputs, find_inputs, read_documents
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
    for name in ("d/b.txt", "d/deep/a.txt", "d/c.jsonl", "d/.hidden/x.txt", "d/.x", "e/z.txt"):
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
        (f"{tmp_path}/d, {tmp_path}/d/deep/../b.txt", "have one name, 'b.txt'"),
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
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
    with pytest.raises(UserError, match=f"a.jsonl {message}"):
        read(tmp_path / "a.jsonl")


def test_damaged_files_are_named(tmp_path):
    for name, message in (
        ("a.jsonl.gz", r"a.jsonl.gz line \d+: the gzip data is damaged"),
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
