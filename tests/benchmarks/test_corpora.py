"""`benchmarks/corpora.py` with packages of a few files in the place of Debian's."""

import gzip
import json
import tarfile

import pytest

from benchmarks import corpora
from train.data.held_out import is_held_out
from train.data.tokenizers import load_tokenizer
from train.errors import UserError

PAGE = """<html><head><title>no</title></head><body><div class="sphinxsidebar">no</div><div role="main">
<h1>Locks<a class="headerlink" href="#locks">¶</a></h1>


<p>A <em>spinning</em> lock &amp; its
owner.</p></div></body></html>"""


def unpacked(files):
    """A `run` that makes a package and what is in it."""

    def run(*command, cwd):
        if command[0] == "apt-get":
            (cwd / "linux_1_all.deb").write_bytes(b"package")
        elif command[0] == "dpkg-deb":
            for name, content in files.items():
                path = cwd / "package" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        else:
            (archive,) = cwd.rglob("*.tar.xz")
            with tarfile.open(archive) as content:
                content.extractall(cwd, filter="data")

    return run


def documents(path):
    return [json.loads(line)["text"] for line in gzip.open(path / corpora.TEXT)]


def test_page_is_its_main_part_without_markup():
    assert corpora.text_of_page(PAGE.encode()) == "Locks\n\nA spinning lock & its\nowner."
    assert corpora.text_of_page(b"<html><body><p>a list of links</p></body></html>") == ""


def test_prose_has_a_tokenizer_of_what_is_not_held_out(tmp_path, monkeypatch):
    page = '<html><body><div role="main"><p>{}</p></div></body></html>'
    files = {f"{n:02d}.html": page.format(f"word{n:02d} " * 60).encode() for n in range(60)} | {
        "short.html": b"<p>a</p>"
    }
    monkeypatch.setattr(corpora, "run", unpacked(files))
    found = corpora.make("prose", tmp_path / "prose", None)
    texts = documents(tmp_path / "prose")
    assert (found["documents"], found["bytes"], found["package"]) == (60, 60 * 419, "linux_1_all.deb")
    assert json.loads((tmp_path / "prose" / "corpus.json").read_text()) == found
    tokenizer = load_tokenizer(str(tmp_path / "prose" / "tokenizer.json"))
    held_out = [is_held_out(f"{corpora.TEXT}:{number}", 5) for number in range(1, 61)]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert 0 < sum(held_out) < 10
    assert max(length for length, held in zip(lengths, held_out) if not held) < min(
        length for length, held in zip(lengths, held_out) if held
    )


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """Makes linux-source of these files."""

    def pack(files):
        sources = tmp_path / "sources"
        sources.mkdir()
        for name, content in files.items():
            (sources / name).write_bytes(content)
        with tarfile.open(tmp_path / "linux-source-6.tar.xz", "w:xz") as archive:
            archive.add(sources, "linux")
        package = {"linux-source-6.tar.xz": (tmp_path / "linux-source-6.tar.xz").read_bytes()}
        monkeypatch.setattr(corpora, "run", unpacked(package))

    return pack


def test_c_is_cut_at_whole_documents_of_utf8(linux, tmp_path):
    linux({"a.c": b"int a;\r\n", "b.h": b"int b;\n", "c.c": b"\xff", "d.txt": b"no"})
    corpora.make("c", tmp_path / "c", None)
    assert sorted(documents(tmp_path / "c")) == ["int a;\r\n", "int b;\n"]
    assert corpora.make("c", tmp_path / "c", 9)["documents"] == 1


def test_c_has_no_file_above_a_megabyte(linux, tmp_path):
    linux({"table.h": b"/" * 1_000_001, "long.c": b"/" * 1_000_000, "a.c": b"int a;\n"})
    assert corpora.make("c", tmp_path / "c", None)["documents"] == 2
    assert sorted(map(len, documents(tmp_path / "c"))) == [7, 1_000_000]


def test_file_of_one_text_is_the_same_at_any_time(tmp_path, monkeypatch):
    for now in (1, 2):
        (tmp_path / str(now)).mkdir()
        monkeypatch.setattr(gzip.time, "time", lambda now=now: now)
        corpora.write_text(["int a;\n"], tmp_path / str(now) / corpora.TEXT, None)
    first, second = ((tmp_path / now / corpora.TEXT).read_bytes() for now in "12")
    assert first == second
    assert documents(tmp_path / "1") == ["int a;\n"]


@pytest.mark.parametrize(
    ("command", "message"), [(("false",), "false ended with exit status 1"), (("no-such-command",), "is not here")]
)
def test_command_that_fails_is_named(command, message, tmp_path):
    with pytest.raises(UserError, match=message):
        corpora.run(*command, cwd=tmp_path)
