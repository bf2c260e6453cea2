"""A run's model continues a prompt, and the text shows as it comes: `python -m train.generate --workdir DIR ...`."""

from train.keyboard import INTERRUPTED, InterruptRequest, take_interrupts

if __name__ == "__main__":
    take_interrupts()  # before the imports below, which take seconds

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from ml_collections import ConfigDict

from train.command_line import Parser, warn
from train.compilation_cache import keep_programs
from train.data.contents import check_text, decode_text
from train.data.tokenizers import load_kept_tokenizer
from train.errors import UserError
from train.memory import enough_memory
from train.random_key import random_key
from train.restore import build_anywhere, read_saved_config, restore_on_one_device
from twomamba_jax.generation import decode, fork, prefill, seed
from twomamba_jax.layers import LanguageModel, init_cache
from twomamba_jax.layers.tokens import as_tokens
from twomamba_jax.ops.decoding.cached_attention import FOLD_SIZE
from twomamba_jax.ops.dispatch import IMPLEMENTATIONS
from twomamba_jax.ops.score import SCORES
from twomamba_jax.ops.state import state_bytes
from twomamba_jax.sampling import Sampling, check_sampling

BLOCK = 16  # tokens between two looks at the screen
MIB = 2**20
LESS_MEMORY = "make --num_samples, --prefill_size or --max_length smaller"

DESCRIPTION = """\
Continues a prompt with the model that was trained in a working directory. Text goes to stdout as it comes; the speed
and the size of the cache to stderr at the end. Mistakes are one line on stderr and exit status 2. Ctrl-C ends with the
block of tokens that is under way, a second one at once, and exits with 130; 141 says that nobody read the text any
more. Compiled programs are kept in ~/.cache/twomamba_jax, unless JAX_COMPILATION_CACHE_DIR names another place or
JAX_ENABLE_COMPILATION_CACHE is 0."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Raises UserError for a wrong command line."""
    parser = Parser("python -m train.generate", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    home = os.path.expanduser  # a shell leaves the ~ of --workdir=~/run as it is
    add("--workdir", type=lambda text: Path(home(text)), required=True, metavar="DIR", help="of a run of train.main")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="may be empty: the model then starts a document")
    prompt.add_argument("--prompt_file", type=home, metavar="FILE", help="- reads standard input")
    add("--max_new_tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, default=0.7, metavar="X", help="0 takes the likeliest token")
    add("--top_k", type=int, metavar="K")
    add("--top_p", type=float, metavar="P")
    add("--num_samples", type=int, default=1, metavar="N")
    add("--seed", type=int, default=0)
    add("--checkpoint", choices=("best", "latest"), default="best", help="by held-out loss, or by step")
    add("--max_length", type=int, metavar="N", help="tokens of key/value caches; default: as many as needed")
    add("--prefill_size", type=int, metavar="N", help="reads a long prompt in pieces of so many tokens")
    add("--fold_size", type=int, default=FOLD_SIZE, metavar="R", help="tokens that a finite state takes in at a time")
    add("--implementation", choices=IMPLEMENTATIONS, help="default: the run's, or another if that cannot run here")
    return parser.parse_args(arguments)


def load(workdir: Path, which: str, implementation: str | None = None) -> tuple[LanguageModel, Any, Any]:
    """The model, parameters and tokenizer of a run. Raises `train.errors.UserError`.

    `implementation` is that of `build_anywhere`.
    """
    config = read_saved_config(workdir)
    tokenizer = load_kept_tokenizer(config["data"], workdir)
    model = build_anywhere(ConfigDict(config), implementation)
    params, _ = restore_on_one_device(workdir, model, which, warn)
    return model, params, tokenizer


def read_prompt(name: str) -> str:
    """The text of the file `name`, or of standard input, as training would read it: line ends stay as they are.

    Raises ValueError where it cannot be read, and `train.errors.UserError` where it is no text.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read --prompt_file {name}: {error}") from error
    check_text(content, f"--prompt_file {name}")
    return decode_text(content)


def prompt_tokens(options: argparse.Namespace, tokenizer) -> np.ndarray:
    """The prompt behind the token that opens a document: bos where there is one, else the end of the one before."""
    text = options.prompt if options.prompt is not None else read_prompt(options.prompt_file)
    tokens = tokenizer.encode(text)
    first = tokenizer.bos_id
    if first is None and not tokens.size:
        first = tokenizer.eos_id
    return tokens if first is None else np.concatenate([np.array([first], np.int32), tokens])


def blocks(model: LanguageModel, params, tokens, options, stop_tokens) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Blocks of new tokens [rows, <= BLOCK], how many of each row count, and the bytes of the cache."""
    if options.max_new_tokens < 1 or options.num_samples < 1:
        raise ValueError(
            f"--max_new_tokens={options.max_new_tokens} and --num_samples={options.num_samples} must be at least 1"
        )
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    sampling = check_sampling(sampling, model.config.vocab_size)
    tokens, _, _ = as_tokens(tokens[None], model.config.vocab_size)
    needed = tokens.shape[1] + options.max_new_tokens
    capacity = needed if options.max_length is None else options.max_length
    if capacity < needed and any(SCORES[mixer.score].finite is None for mixer in model.config.mixers):
        raise ValueError(
            f"the prompt's {tokens.shape[1]} tokens and --max_new_tokens={options.max_new_tokens} do not fit into "
            f"key/value caches of --max_length={capacity}: raise it, or omit it"
        )
    cache = init_cache(model.config, 1, capacity, fold_size=options.fold_size, dtype=model.execution.dtype)
    state = fork(prefill(model, params, tokens, cache, prefill_size=options.prefill_size), options.num_samples)
    state = seed(state, random_key(options.seed))
    size, left = state_bytes(state.cache), options.max_new_tokens
    while left > 0 and not state.done.all():
        # The last block too, of which fewer may be wanted: another length would be another program to compile.
        new, state = decode(model, params, state, BLOCK, sampling=sampling, stop_tokens=stop_tokens)
        shown = min(BLOCK, left)
        left -= shown
        yield np.asarray(new.tokens)[:, :shown], np.minimum(new.lengths, shown), size


class Stream:
    """Prints the text of tokens as far as it is certain: half a character waits for its other half."""

    def __init__(self, tokenizer, out: TextIO):
        """Nothing is printed yet."""
        self._tokenizer, self._out = tokenizer, out
        self._ids: list[int] = []
        self._shown = 0

    def write(self, ids: Sequence[int]) -> None:
        """More tokens."""
        self._ids.extend(ids)
        self._show(self._tokenizer.decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self) -> None:
        """No more tokens: shows what waited, and ends the line."""
        self._show(self._tokenizer.decode(self._ids))
        print(file=self._out, flush=True)

    def _show(self, text: str) -> None:
        print(text[self._shown :], end="", file=self._out, flush=True)
        self._shown = max(self._shown, len(text))


def run(options: argparse.Namespace, interruption: InterruptRequest) -> int:
    """Generates and prints; returns the exit status."""
    keep_programs(warn)
    model, params, tokenizer = load(options.workdir, options.checkpoint, options.implementation)
    tokens = prompt_tokens(options, tokenizer)
    streams = [Stream(tokenizer, sys.stdout)] if options.num_samples == 1 else []
    rows: list[list[int]] = [[] for _ in range(options.num_samples)]
    size, times, counts = 0, [time.perf_counter()], []
    interruption.keeps = True
    for new, lengths, cache_size in blocks(model, params, tokens, options, (tokenizer.eos_id,)):
        size = cache_size
        for row, ids, length in zip(rows, new.tolist(), lengths.tolist()):
            row += ids[:length]
            for stream in streams:
                stream.write(ids[:length])
        times.append(time.perf_counter())
        counts.append(int(lengths.sum()))
        if interruption.requested:
            break
    for stream in streams:
        stream.finish()
    for number, row in enumerate([] if streams else rows):
        print(f"--- sample {number + 1}")
        print(tokenizer.decode(row))
    if len(counts) > 1:  # the first block is compiled as well
        speed = f"{sum(counts[1:]) / (times[-1] - times[1]):,.0f} tokens/s after the first {BLOCK}"
    else:
        speed = "too few tokens for a speed"
    print(f"{sum(counts)} tokens, {speed}; cache {size / MIB:,.2f} MiB", file=sys.stderr)
    return INTERRUPTED if interruption.requested else 0


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status.

    0; 2 for a mistake of the user, or a disk without room; 130 for an interrupt; 141 where nobody reads what it writes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks shows as an escape
    try:
        options = parse(arguments)
        with InterruptRequest() as interruption, enough_memory(LESS_MEMORY):
            return run(options, interruption)
    except (UserError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        close_output()
        if isinstance(error, BrokenPipeError):
            print("stopped: nobody reads standard output any more", file=sys.stderr)
            return 141  # 128 + SIGPIPE, as the shell says of others
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def close_output() -> None:
    """Lets what is still buffered for standard output go nowhere: writing it at exit would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
