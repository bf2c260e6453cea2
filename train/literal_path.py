"""A path in which no character is a pattern, for Orbax: it lists directories by a glob that takes in the path above."""

from collections.abc import Iterator
from pathlib import Path

from etils import epath


class LiteralPath(type(epath.Path("/"))):
    """A local path; `[`, `*` and `?` in it stand for themselves, and only what `glob` is given is a pattern."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """The paths below this one that match `pattern`."""
        return map(type(self), Path(self).glob(pattern))
