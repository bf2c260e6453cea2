"""The corpus: which files, which split, and a digest that notices any change."""

import errno
import os

import numpy as np
import pytest

from train.data.corpus import find_files, read_corpus
from train.data.held_out import is_held_out
from train.errors import UserError


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_leaves_out_tests_packages_and_caches(tmp_path):
    kept = {"b.py": "b", "a/x.py": "x", "a/testing.py": "t"}
    left_out = [
        "test/x.py", "a/tests/x.py", "idlelib/idle_test/x.py", "lib2to3/tests/x.py", "site-packages/p/x.py",
        "a/__pycache__/x.py", "a/test_x.py", "c.txt",
    ]  # fmt: skip
    write(tmp_path, kept | dict.fromkeys(left_out, "no"))
    assert find_files(tmp_path, ".py") == ["a/testing.py", "a/x.py", "b.py"]
    assert find_files(tmp_path, ".txt") == ["c.txt"]


def test_documents_are_the_bytes_in_order_of_paths(tmp_path):
    files = {f"f{number}.py": f"text {number} é" for number in range(30)} | {"empty.py": ""}
    write(tmp_path, files)
    corpus = read_corpus(str(tmp_path), ".py", 30)
    for documents, held_out in ((corpus.train, False), (corpus.held_out, True)):
        expected = [files[path] for path in sorted(files) if files[path] and is_held_out(path, 30) == held_out]
        assert [bytes(document).decode() for document in documents] == expected
        assert all(document.dtype == np.uint8 for document in documents)
    assert corpus.train
    assert corpus.held_out


@pytest.mark.parametrize("change", [{"f1.py": "other"}, {"new.py": "x"}])
def test_digest_sees_contents_and_paths(tmp_path, change):
    write(tmp_path, {f"f{number}.py": f"text {number}" for number in range(30)})
    before = read_corpus(str(tmp_path), ".py", 30).digest
    assert read_corpus(str(tmp_path), ".py", 30).digest == before
    write(tmp_path, change)
    assert read_corpus(str(tmp_path), ".py", 30).digest != before


def test_digest_sees_a_renamed_file(tmp_path):
    write(tmp_path, {f"f{number}.py": f"text {number}" for number in range(30)})
    before = read_corpus(str(tmp_path), ".py", 30).digest
    (tmp_path / "f29.py").rename(tmp_path / "f3_.py")
    assert read_corpus(str(tmp_path), ".py", 30).digest != before


def test_a_name_that_is_no_utf_8_counts_like_any_other(tmp_path):
    write(tmp_path, {f"f{number}.py": f"text {number}" for number in range(30)})
    before = read_corpus(str(tmp_path), ".py", 30)
    (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text("text")
    after = read_corpus(str(tmp_path), ".py", 30)
    assert after.digest != before.digest
    assert len(after.train + after.held_out) == 31


def test_a_file_under_two_names_is_read_once(tmp_path):
    write(tmp_path, {f"f{number}.py": f"text {number}" for number in range(30)})
    expected = read_corpus(str(tmp_path), ".py", 30)
    for number in range(30):
        (tmp_path / f"g{number}.py").symlink_to(f"f{number}.py")
        (tmp_path / f"h{number}.py").hardlink_to(tmp_path / f"f{number}.py")
    found = read_corpus(str(tmp_path), ".py", 30)
    assert found.digest == expected.digest
    assert len(found.train + found.held_out) == 30


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {"a.py": "a"})
    (tmp_path / "b.py").symlink_to("gone.py")
    with pytest.raises(UserError, match=r"cannot read .*b\.py: No such file"):
        read_corpus(str(tmp_path), ".py", 5)


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.py": "a", "closed/b.py": "b"})
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        read_corpus(str(tmp_path), ".py", 5)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    write(tmp_path, {f"d/f{number}.py": f"text {number}" for number in range(30)})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_corpus("~/d", ".py", 30).digest == read_corpus(str(tmp_path / "d"), ".py", 30).digest


def test_standard_library_is_large_and_has_both_splits():
    corpus = read_corpus(None, ".py", 5)
    train, held_out = (sum(document.size for document in part) for part in (corpus.train, corpus.held_out))
    assert train > 5_000_000
    assert 0.02 < held_out / train < 0.12


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UserError, match="the corpus is empty"):
        read_corpus(str(tmp_path), ".py", 5)
    with pytest.raises(UserError, match="is not a directory"):
        read_corpus(str(tmp_path / "none"), ".py", 5)
    write(tmp_path, {"a.py": "a"})
    with pytest.raises(UserError, match=r"held-out split .* is empty"):
        read_corpus(str(tmp_path), ".py", 0)
    with pytest.raises(UserError, match=r"training split .* is empty"):
        read_corpus(str(tmp_path), ".py", 100)
