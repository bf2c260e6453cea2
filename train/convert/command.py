"""What `python -m train.convert` does: its options, its messages, its exit status."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from train.command_line import Parser, warn
from train.convert.exporting import export_run
from train.convert.importing import import_checkpoint
from train.errors import UserError
from train.keyboard import INTERRUPTED, interrupts_raised
from train.output import lenient_output
from train.paths import expand_user

DESCRIPTION = """\
Takes weights in and out. `import` makes a workdir, which train.generate and train.main accept, of a checkpoint
directory: the paper's authors' (config.json with attention_type, *.safetensors), a Mamba-2 of Hugging Face's or of
state-spaces/mamba, or one that `export` made of a run. Mistakes are one line on stderr and exit status 2.
docs/weights.md says more."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises UserError for a wrong command line."""
    parser = Parser("python -m train.convert", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    one = commands.add_parser("import", allow_abbrev=False, help="a checkpoint directory becomes a workdir")
    one.add_argument("directory", metavar="DIR", help="with config.json and *.safetensors")
    one.add_argument("--workdir", required=True, metavar="OUT", help="new, or empty")
    one.add_argument("--tokenizer", metavar="FILE", help="bytes, ids:N, or a file; default: what DIR has")
    two = commands.add_parser("export", allow_abbrev=False, help="a run becomes a checkpoint directory")
    two.add_argument("--workdir", required=True, metavar="DIR", help="of a run of train.main, or an import")
    two.add_argument("--out", required=True, metavar="OUT", help="new, or empty")
    two.add_argument("--layout", choices=("own", "authors"), default="own", help="authors: for the variants they have")
    two.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="by held-out loss, or by step")
    options = parser.parse_args(arguments)
    for name, shown in (("directory", "DIR"), ("workdir", "--workdir"), ("out", "--out")):
        if name in options:
            setattr(options, name, Path(expand_user(shown, getattr(options, name))))
    return options


@lenient_output()
def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for a mistake of the user."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what goes wrong in a save, and raises it as well
    try:
        options = parse(arguments)
        with interrupts_raised():
            if options.command == "import":
                import_checkpoint(options.directory, options.workdir, options.tokenizer, print)
            else:
                export_run(options.workdir, options.out, options.layout, options.checkpoint, print, warn)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
