"""What is held out: whole documents by a hash of their names, or the end of a single one."""

import hashlib
import os

import pytest

from train.data.held_out import find_cut, hold_out, is_held_out


def test_a_name_is_held_out_by_its_hash_whatever_its_bytes():
    for name in (b"a.py", b"b/c.py", b"json/decoder.py", b"caf\xe9.txt:3"):
        position = int(hashlib.sha256(name).hexdigest()[:16], 16) % 100
        assert not is_held_out(os.fsdecode(name), position)
        assert is_held_out(os.fsdecode(name), position + 1)


def test_several_documents_are_held_out_whole():
    documents = [(f"f{number}", f"text\n{number}") for number in range(40)]
    expected = [(is_held_out(name, 30), text) for name, text in documents]
    assert list(hold_out(documents, 30)) == expected
    assert {held_out for held_out, _ in expected} == {False, True}
    assert list(hold_out([], 30)) == []


@pytest.mark.parametrize("line", ["To be, or not to be.\n", "To be, or not to be.\r\n", "sein\x85oder nicht sein\n"])
def test_of_a_single_document_the_last_lines_are_held_out(line):
    (train, held_out) = hold_out([("input.txt", line * 1000)], 5)
    assert train == (False, line * 950)
    assert held_out == (True, line * 50)


def test_an_end_without_lines_is_cut_to_the_character():
    assert find_cut("x" * 1000, 5) == 950
    assert find_cut("title\n" + "x" * 994, 5) == 950
    assert find_cut("x" * 998 + "\n\n", 5) == 950
    assert find_cut("x" * 960 + "\n" + "x" * 39, 5) == 961
    assert find_cut("x" * 939 + "\n" + "x" * 60, 5) == 940


@pytest.mark.parametrize(("percent", "held_out"), [(0, False), (100, True)])
def test_nothing_or_all_of_a_single_document_is_held_out(percent, held_out):
    assert list(hold_out([("a", "xyz")], percent)) == [(held_out, "xyz")]
