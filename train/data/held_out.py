"""Which text is held out where nothing names it: some documents of many, or the end of one."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from train.data.contents import encode_name


def is_held_out(name: str, percent: int) -> bool:
    """Whether the document of this name (a relative path with forward slashes, or more) is held out, by its hash."""
    return int.from_bytes(hashlib.sha256(encode_name(name)).digest()[:8], "big") % 100 < percent


def hold_out(documents: Iterable[tuple[str, str]], percent: int) -> Iterator[tuple[bool, str]]:
    """(held out or not, text) of every (name, text).

    Of several documents, whole ones are held out. A single one, of which a hash would leave one split empty, is cut
    into two: its end is held out.
    """
    documents = iter(documents)
    first = list(islice(documents, 2))
    if len(first) == 1:
        ((_, text),) = first
        cut = find_cut(text, percent)
        yield from ((held_out, part) for held_out, part in ((False, text[:cut]), (True, text[cut:])) if part)
    else:
        yield from ((is_held_out(name, percent), text) for name, text in chain(first, documents))


def find_cut(text: str, percent: int) -> int:
    """Where the last `percent` of `text` start: at a line's start, if that makes them at most half more or less.

    A text without such a line is cut to the character.
    """
    size = len(text) * percent // 100
    target = len(text) - size
    before = text.rfind("\n", max(target - size // 2, 0), target) + 1
    return before or text.find("\n", target, target + size // 2) + 1 or target
