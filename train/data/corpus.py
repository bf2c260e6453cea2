"""The default corpus: source text on this disk, one document a file.

Without a root it is the source of Python's own standard library, so a first run needs no download. Tests, installed
packages and caches are left out. A file belongs to the held-out split by a hash of its relative path, so it stays there
on every machine and whatever files come or go around it.
"""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data.contents import check_text, encode_name
from train.data.documents import input_of, without_twins
from train.data.held_out import is_held_out
from train.errors import UserError

EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "node_modules", ".git"}
)


@dataclass(frozen=True)
class Corpus:
    """Documents of both splits, each uint8 [bytes], in the order of their paths; `digest` is of paths and contents."""

    train: list[np.ndarray]
    held_out: list[np.ndarray]
    digest: str


def find_files(root: Path, suffix: str) -> list[str]:
    """The relative paths below `root` that end in `suffix`, sorted, without tests, packages and caches.

    Raises OSError where a directory cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, directories, names in os.walk(root, onerror=fail):
        directories[:] = [name for name in directories if name not in EXCLUDED_DIRECTORIES]
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in names
            if name.endswith(suffix) and not (name.startswith("test_") and name.endswith(".py"))
        ]
    return sorted(found)


def read_corpus(root: str | None, suffix: str, held_out_percent: int) -> Corpus:
    """Reads the files of `root` (None: the standard library) whose names end in `suffix`.

    Raises UserError where there is no such directory, no file in it, a file that cannot be read or is no text, or
    nothing in one of the two splits.
    """
    directory = Path(sysconfig.get_paths()["stdlib"] if root is None else os.path.expanduser(root))
    if not os.path.isdir(directory):
        raise UserError(f"data.root {str(directory)!r} is not a directory")
    digest = hashlib.sha256()
    splits: dict[bool, list[np.ndarray]] = {False: [], True: []}
    try:
        inputs = [input_of(directory / name, name) for name in find_files(directory, suffix)]
        # Some systems link equal files of the standard library to one another; its digest is not to depend on them.
        for entry in inputs if root is None else without_twins(inputs):
            content = entry.path.read_bytes()
            check_text(content, str(entry.path))
            digest.update(encode_name(entry.name) + f"\0{len(content)}\0".encode() + content)
            if content:
                splits[is_held_out(entry.name, held_out_percent)].append(np.frombuffer(content, np.uint8))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    if not splits[False] and not splits[True]:
        raise UserError(f"the corpus is empty: no text in files named *{suffix} below {str(directory)!r}")
    for held_out, name in ((False, "training"), (True, "held-out")):
        if not splits[held_out]:
            raise UserError(
                f"the {name} split of {str(directory)!r} is empty: data.held_out_percent={held_out_percent} "
                f"leaves it none of {len(splits[not held_out])} files; "
                "data.source=files holds out the end of a single one"
            )
    return Corpus(splits[False], splits[True], digest.hexdigest())
