"""Paths as they are typed: behind `=`, a shell leaves `~` to the program."""

import os

from train.errors import UserError


def expand_user(name: str, path: str) -> str:
    """`path` with the home directory in place of a leading `~` or `~USER`; `name` is the option's, for the message.

    Raises UserError for an empty path, and for a USER that does not exist.
    """
    if not path:
        raise UserError(f"{name} is empty: give a path")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{name}={path!r}: there is no home directory of that user; write ./{path} for this very name")
    return expanded
