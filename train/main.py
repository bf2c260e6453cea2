"""Command line of the training: `python -m train.main --config configs/2mamba.py:nano --config.KEY=VALUE`."""

import argparse
import logging
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from rich.console import Console

from train.configuration import apply_overrides, load_config
from train.errors import UserError, one_line
from train.loop import run
from train.processes import join, leave, process_name
from train.workdir import default_workdir
from twomamba_jax.compilation_cache import keep_programs

DESCRIPTION = """\
Trains a language model. Giving the same command again resumes the run from its latest checkpoint. Every key of the
configuration can be set by --config.KEY=VALUE, nested keys with dots: --config.optimizer.learning_rate=1e-3.
SIGTERM and SIGINT save and end the run with exit status 0. Several processes are one run: see docs/sharding.md.
Mistakes in the command or the data are one line on stderr and exit status 2."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the rest of the program does: one line, no usage above it."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see --help")


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The options `config`, `workdir` and `debug`, and the overrides as (dotted key, text). Raises UserError."""
    parser = Parser("python -m train.main", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="PATH[:SIZE]", help="such as configs/2mamba.py:small")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="default: runs/NAME-SIZE, and a hash of overrides")
    parser.add_argument("--debug", action="store_true", help="show where in the code a mistake was noticed")
    options, rest = parser.parse_known_args(arguments)
    overrides = []
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not key:
            raise UserError(f"unknown argument {argument!r}; see --help")
        if not equals:
            if not rest:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            text = rest.pop(0)
        overrides.append((key, text))
    return options, overrides


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a mistake of the user, 130 where it could not save."""
    resume, debug = "", False
    # Orbax logs what goes wrong in a save with its traceback, and raises it as well: here it is one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        options, overrides = parse_arguments(arguments)
        debug = options.debug
        config, defaults = load_config(options.config), load_config(options.config)
        apply_overrides(config, overrides)
        workdir = default_workdir(config, defaults) if options.workdir is None else options.workdir
        settings = [f"--config.{key}={text}" for key, text in overrides]
        command = ["python", "-m", "train.main", "--config", options.config, *settings, "--workdir", str(workdir)]
        resume = shlex.join(command)
        keep_programs(lambda message: print(f"warning: {message}", file=sys.stderr))
        join(config.distributed)
        console = Console(quiet=jax.process_index() > 0)
        step = run(config, workdir, lambda message: print(f"warning: {message}", file=sys.stderr), console)
        if step < config.steps:
            console.print(f"stopped by a signal, saved at step {step}", highlight=False, soft_wrap=True)
        console.print(f"to resume or extend: {resume}", highlight=False, markup=False, soft_wrap=True)
    except UserError as error:
        if debug:  # The library's refusals are ValueErrors, and so are mistakes in a layer that somebody is writing.
            traceback.print_exc()
        print(f"error: {process_name()}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; to resume from the latest checkpoint: {resume}", file=sys.stderr)
        return 130
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # The latter where a failed collective's result is read.
        if not jax.distributed.is_initialized():
            raise
        if debug:
            traceback.print_exc()
        print(
            f"error: {process_name()}{one_line(error)}; where another process ended first, its own last line says why; "
            "give all of them the same command again to resume",
            file=sys.stderr,
        )
        return 2
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()  # and then `leave`: the others would wait for this process, and it for them
        return 1
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
