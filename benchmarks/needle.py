"""A needle in a haystack, by length: `python benchmarks/needle.py WORKDIR ... --lengths 512 1024 2048 4096 8192`.

For each run of `train.main`: a row is the start of one of its held-out documents with a line `NAME = VALUE` in it, both
of 8 random letters, and at its end the line again up to the value. Rows of a length have the line at evenly spread
depths. `exact` is the share of rows of which each token of the value is the likeliest at its place, given those before
it; `accuracy` is the share of these tokens: of bytes a guess has about 1 / 26. Lengths are in tokens, and may be longer
than the model was trained with.
"""

import argparse
import json
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import clone  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
from recall_members import Examples, states_at_targets

from train.command_line import warn
from train.data.tokenized import Split
from train.data.tokenizers import Tokenizer
from train.errors import UserError
from train.evaluate import read_run
from train.restore import build_anywhere, restore_on_one_device
from twomamba_jax.layers import head_kernel, head_logits

LETTERS = 8


def make_rows(documents: Split, tokenizer: Tokenizer, length: int, count: int) -> Examples:
    """`count` rows of `length` tokens, from the documents that are long enough in turn.

    Raises UserError where no document is, or the line leaves no room for one.
    """
    long_enough = [
        start for start, end in zip(documents.starts.tolist(), documents.starts[1:].tolist()) if end - start > length
    ]
    if not long_enough:
        raise UserError(f"no held-out document has more than {length} tokens: give smaller --lengths")
    rng = np.random.default_rng(length)
    made = []
    for number in range(count):
        name, value = ("".join(rng.choice(list(string.ascii_lowercase), LETTERS)) for _ in range(2))
        query, answer, end = map(tokenizer.encode, (f"\n{name} = ", value, "\n"))
        around = 2 * (len(query) + len(answer)) + len(end) - 1
        if around >= length:
            raise UserError(f"--lengths: {length} tokens do not hold a line of {len(query) + len(answer)} twice")
        start = long_enough[number % len(long_enough)]
        hay = documents.tokens[start : start + length - around]
        # The first token may open the document: nothing stands before it.
        depth = 1 + number * (len(hay) - 1) // max(1, count - 1)
        row = np.concatenate([hay[:depth], query, answer, end, hay[depth:], query, answer[:-1]])
        made.append((row.astype(np.int32), answer))
    most = max(len(answer) for _, answer in made)
    positions, targets = np.zeros((2, count, most), np.int32)
    weights = np.zeros((count, most), np.float32)
    for index, (_, answer) in enumerate(made):
        positions[index, : len(answer)] = np.arange(length - len(answer), length)
        targets[index, : len(answer)] = answer
        weights[index, : len(answer)] = 1
    return Examples(np.stack([row for row, _ in made]), positions, targets, weights)


def score(likeliest: Callable[[Examples], Any], rows: Examples, batch_size: int) -> dict[str, float]:
    """`accuracy` and `exact`, where `likeliest(batch)` is the likeliest token after each of the batch's positions."""
    hits = []
    for start in range(0, len(rows.tokens), batch_size):
        batch = Examples(*(array[start : start + batch_size] for array in rows))
        hits.append((np.asarray(likeliest(batch)) == batch.targets) * batch.weights)
    found = np.concatenate(hits)
    return {
        "accuracy": float(np.sum(found, dtype=np.float64) / np.sum(rows.weights, dtype=np.float64)),
        "exact": float(np.mean(np.sum(found, axis=1) == np.sum(rows.weights, axis=1))),
    }


def measure(workdir: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The scores of a run's model, one record a length. Raises UserError."""
    config, task = read_run(workdir, [])
    if task.tokenizer is None:
        raise UserError(f"the run in {workdir} is of no text")
    model = build_anywhere(config)
    params, step = restore_on_one_device(workdir, model, options.checkpoint, warn)

    @jax.jit
    def likeliest(params: Any, batch: Examples) -> jax.Array:
        return jnp.argmax(head_logits(states_at_targets(model, params, batch), head_kernel(params)), axis=-1)

    same = {"workdir": str(workdir), "variant": config.variant, "step": step, "trained_length": config.length}
    records = []
    for length in options.lengths:
        rows = make_rows(task.held_out.documents, task.tokenizer, length, options.rows)
        scores = score(lambda batch: likeliest(params, batch), rows, options.batch_size)
        records.append(same | {"length": length, "rows": options.rows} | scores)
    return records


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        "python benchmarks/needle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="of a run of train.main, of text")
    add("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192], metavar="T")
    add("--rows", type=int, default=128, help="of each length")
    add("--batch_size", type=int, default=8)
    add("--checkpoint", choices=("best", "latest"), default="best", help="by held-out loss, or by step")
    add("--json", action="store_true", help="prints a JSON object for each run and length")
    options = parser.parse_args(arguments)
    try:
        if min(options.rows, options.batch_size, *options.lengths) < 1:
            raise UserError("--lengths, --rows and --batch_size must be positive")
        if not options.json:
            print("| run | variant | trained at | length | accuracy | exact |\n|---|---|---:|---:|---:|---:|")
        for workdir in options.workdirs:
            for one in measure(workdir, options):
                line = f"| {workdir.name} | {one['variant']} | {one['trained_length']:,} | {one['length']:,} "
                line += f"| {one['accuracy']:.3f} | {one['exact']:.3f} |"
                print(json.dumps(one) if options.json else line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
