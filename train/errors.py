"""The one exception that stands for a mistake of the user, and the hint that goes with most of them."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """Something that the user can put right. The command line prints it as one line and exits with status 2."""

    def __str__(self) -> str:
        """The message, with the line breaks that the name of a file may hold as escapes."""
        return super().__str__().replace("\n", "\\n").replace("\r", "\\r")


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown `word`: the nearest of `choices`, or all of them where none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(choices)}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error` on one line of at most `limit` characters, with its type where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def import_extra(module: str, extra: str) -> ModuleType:
    """The module, which the package's `extra` installs. Raises UserError naming the extra where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package {module!r} ({one_line(error)}): pip install 'twomamba-jax[{extra}]'"
        ) from error
