"""Corpora of the accuracy ladder, from Debian's packages: `python benchmarks/corpora.py prose --out runs/corpora`.

`prose` is the English documentation of Linux (linux-doc-6.12) with the markup taken off, and a BPE of 8,192 tokens that
is trained on what is not held out; `c` is Linux' source in C (linux-source-6.12), as bytes, for runs of one pass. Both
need a Debian, or its `apt-get` and `dpkg-deb`, and leave in OUT/NAME: text.jsonl.gz, one document a line, the same
file at any time; tokenizer.json (prose); and corpus.json, with the package's version and the SHA-256 of package and of
the lines of text.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import clone  # noqa: F401
import lxml.html
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from configs import base
from train.data.documents import find_inputs, read_documents
from train.data.held_out import is_held_out
from train.errors import UserError

PACKAGES = {"prose": "linux-doc-6.12", "c": "linux-source-6.12"}
TEXT, VOCABULARY, END = "text.jsonl.gz", 8192, "</s>"
SHORTEST = 200  # characters; pages that only list others have fewer
LARGEST = 10**6  # bytes of a file in C; 15 above it, generated tables of registers, were 40 % of a training text


def run(*command: str, cwd: Path) -> None:
    """Runs a command. Raises UserError with what it said last where it fails, or is not there."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not here: run this on a Debian") from error
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{' '.join(command)} ended with exit status {done.returncode}: {said}")


def text_of_page(html: bytes) -> str:
    """What a page of Sphinx' says: its main part, without markup and the marks of links to its headings."""
    (main,) = lxml.html.fromstring(html).xpath('//div[@role="main"]') or (None,)
    if main is None:
        return ""
    for mark in main.xpath('.//a[@class="headerlink"]'):
        mark.drop_tree()
    lines = (line.rstrip() for line in main.text_content().splitlines())
    return "\n".join(_without_runs(lines)).strip()


def _without_runs(lines: Iterable[str]) -> Iterator[str]:
    """The lines, with one empty line where there are several."""
    before = ""
    for line in lines:
        if line or before:
            yield line
        before = line


def read_prose(directory: Path) -> Iterator[str]:
    """The pages of linux-doc, in the order of their paths."""
    for path in sorted(directory.rglob("*.html")):
        text = text_of_page(path.read_bytes())
        if len(text) >= SHORTEST:
            yield text


def read_c(directory: Path) -> Iterator[str]:
    """The files of linux-source in C that are UTF-8 and at most `LARGEST`, by the hashes of their paths.

    In that order any part is like all.
    """
    (archive,) = directory.rglob("linux-source-*.tar.xz")
    run("tar", "-xJf", str(archive), "--wildcards", "*.c", "*.h", cwd=directory)
    paths = (path for end in ("c", "h") for path in directory.rglob(f"*.{end}") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in paths if path.stat().st_size <= LARGEST}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            yield names[name].read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


READERS = {"prose": read_prose, "c": read_c}


def write_text(documents: Iterable[str], path: Path, most_bytes: int | None) -> dict[str, str | int]:
    """Writes documents up to the first that would be too much; returns how many, their bytes and their digest."""
    count, size, digest = 0, 0, hashlib.sha256()
    # The time would be in the file's digest, which names the corpus in every row of the ladder.
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for document in documents:
            content = document.encode()
            if most_bytes is not None and size + len(content) > most_bytes:
                break
            line = json.dumps({"text": document}).encode() + b"\n"
            file.write(line)
            digest.update(line)
            count, size = count + 1, size + len(content)
    return {"documents": count, "bytes": size, "lines_sha256": digest.hexdigest()}


def train_tokenizer(path: Path, held_out_percent: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of the documents of a file that `train.data.text` does not hold out."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=ByteLevel.alphabet())
    documents = read_documents(find_inputs("--out", str(path)), "text")
    tokenizer.train_from_iterator(
        (text for name, text in documents if not is_held_out(name, held_out_percent)), trainer
    )
    return tokenizer


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(name: str, out: Path, most_bytes: int | None) -> dict[str, str | int]:
    """Makes the corpus in `out`; returns what corpus.json says of it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        run("apt-get", "download", PACKAGES[name], cwd=directory)
        (package,) = directory.glob("*.deb")
        run("dpkg-deb", "-x", package.name, "package", cwd=directory)
        found = {"package": package.name, "package_sha256": digest(package)}
        found |= write_text(READERS[name](directory / "package"), out / TEXT, most_bytes)
    if name == "prose":
        held_out_percent = base.get_config(name, "softmax", "nano").data.held_out_percent
        train_tokenizer(out / TEXT, held_out_percent).save(str(out / "tokenizer.json"))
        found["tokenizer_sha256"] = digest(out / "tokenizer.json")
    (out / "corpus.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        "python benchmarks/corpora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PACKAGES)
    parser.add_argument("--out", type=Path, default=Path("runs/corpora"), metavar="DIR", help="made: DIR/NAME")
    parser.add_argument("--megabytes", type=int, help="of text at most; default: all")
    options = parser.parse_args(arguments)
    try:
        found = make(options.name, options.out / options.name, options.megabytes and options.megabytes * 10**6)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
