"""What the command lines here have in common: one line for a mistake, one for a warning."""

import argparse
import sys
from typing import NoReturn

from train.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the rest of the program does: one line, no usage above it."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see --help")


def warn(text: str) -> None:
    """Says what a user should know, while the program goes on."""
    print(f"warning: {text}", file=sys.stderr)
