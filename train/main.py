"""Command line of the training: `python -m train.main --config configs/2mamba.py:nano --config.KEY=VALUE`."""

from train.keyboard import INTERRUPTED, interrupts_raised, take_interrupts

if __name__ == "__main__":
    take_interrupts()  # before the imports below: they take seconds, in which somebody may press Ctrl-C

import argparse
import logging
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console

from train.command_line import Parser, warn
from train.compilation_cache import keep_programs
from train.configuration import apply_overrides, flatten, load_config, validate
from train.errors import UserError, one_line
from train.loop import run
from train.memory import enough_memory
from train.output import lenient_output
from train.paths import expand_user
from train.processes import join, leave, process_name
from train.workdir import default_workdir, free_on_resume

DESCRIPTION = """\
Trains a language model. Giving the same command again resumes the run from its latest checkpoint. Every key of the
configuration can be set by --config.KEY=VALUE, nested keys with dots: --config.optimizer.learning_rate=1e-3.
SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU save and end the run with exit status 0. Several processes are one
run: see docs/sharding.md. Mistakes in the command or the data are one line on stderr and exit status 2."""

OVERRIDE = "--config."
LESS_MEMORY = (
    "make --config.batch_size or --config.length smaller or --config.microbatches larger, or set "
    "--config.execution.remat=full"
)


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The options `config`, `workdir` and `debug`, and the overrides as (dotted key, text). Raises UserError."""
    parser = Parser("python -m train.main", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="PATH[:SIZE]", help="such as configs/2mamba.py:small")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/NAME-SIZE, and a hash of overrides")
    parser.add_argument("--debug", action="store_true", help="show where in the code a mistake was noticed")
    # The overrides first: what stands behind one must be its value, whatever argparse would make of it.
    left, others, overrides = list(arguments), [], []
    while left:
        argument = left.pop(0)
        key, equals, text = argument.removeprefix(OVERRIDE).partition("=")
        if not argument.startswith(OVERRIDE) or not key:
            others.append(argument)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                behind = f", {left[0]!r} stands behind it" if left else ""
                raise UserError(f"{argument} has no value{behind}: write {argument}=VALUE")
            text = left.pop(0)
        overrides.append((key, text))
    options, unknown = parser.parse_known_args(others)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see --help")
    options.config = expand_user("--config", options.config)
    if options.workdir is not None:
        options.workdir = Path(expand_user("--workdir", options.workdir))
    return options, overrides


def last_line(config: ConfigDict, step: int, command: str) -> str:
    """What can be done with a run that ended at `step`, and the command that does it."""
    if step < config.steps:
        return f"to resume: {command}"
    if free_on_resume("steps", flatten(config)):
        return f"with a larger --config.steps, to extend: {command}"
    return f"the learning rate ended with the run, so more steps are another run; to show this one again: {command}"


@lenient_output()
def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a mistake of the user, 130 where it could not save."""
    resume, debug = "", False
    # Orbax logs what goes wrong in a save with its traceback, and raises it as well: here it is one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with interrupts_raised():
            options, overrides = parse_arguments(arguments)
            debug = options.debug
            config, defaults = load_config(options.config), load_config(options.config)
            apply_overrides(config, overrides)
            validate(config)
            workdir = default_workdir(config, defaults) if options.workdir is None else options.workdir
            settings = [f"{OVERRIDE}{key}={text}" for key, text in overrides]
            command = ["python", "-m", "train.main", "--config", options.config, *settings, "--workdir", str(workdir)]
            resume = shlex.join(command)
            keep_programs(warn)
            join(config.distributed)
            console = Console(quiet=jax.process_index() > 0)
            with enough_memory(LESS_MEMORY):
                step = run(config, workdir, warn, console)
            if step < config.steps:
                console.out(f"stopped by a signal, saved at step {step}", highlight=False)
            console.out(last_line(config, step, resume), highlight=False)
    except UserError as error:
        if debug:  # The library's refusals are ValueErrors, and so are mistakes in a layer that somebody is writing.
            traceback.print_exc()
        print(f"error: {process_name()}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = f"; to resume from the latest checkpoint: {resume}" if resume else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
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
