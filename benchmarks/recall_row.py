"""A row of `recall.py`: members that are trained at once, and what is kept of them."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kept_rows import keep_row, origin, variant_in_name
from recall_members import Examples, make_epoch, make_examples, make_members, make_model, make_test
from recall_tasks import Problem, make_rows

from twomamba_jax import cache_bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """Everything that the members' scores depend on, but for the code.

    `members` are pairs of learning rate and seed. They stop when the `stop_when` of them, the best or all, have reached
    `stop_at`, and after `epochs`, over which their learning rates fall, in any case.
    """

    problem: Problem
    d_model: int
    variant: str
    members: tuple[tuple[float, int], ...]
    epochs: int
    batch_size: int
    stop_at: float
    stop_when: str
    dtype: str

    @property
    def name(self) -> str:
        """As a file name, which a hash of all of the row ends."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
        seeds = "+".join(dict.fromkeys(str(seed) for _, seed in self.members))
        return f"{self.problem.name}-{self.d_model}-{variant_in_name(self.variant)}-{seeds}-{digest[:8]}"


@dataclasses.dataclass(frozen=True)
class Data:
    """A problem's rows on the device, with the number of its tokens and the digest of its training rows."""

    train: Examples
    tests: dict[str, Examples]
    num_tokens: int
    digest: str


@functools.lru_cache(maxsize=1)
def load(problem: Problem) -> Data:
    """All rows of the problem at hand; 100,000 of MQAR take a core about half a minute. Raises UserError."""
    train, tests = make_rows(problem)
    placed = jax.device_put([make_examples(rows) for rows in (train, *tests.values())])
    return Data(placed[0], dict(zip(tests, placed[1:])), train.num_tokens, train.digest())


def train_row(row: Row, data: Data, out: Path, commit: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains the members of a row; leaves and returns what is kept of them."""
    model = make_model(row.variant, row.d_model, data.num_tokens, row.dtype)
    (num_rows, length), enough = data.train.tokens.shape, {"best": np.max, "all": np.min}[row.stop_when]
    members = make_members(model, row.members)
    parameters = sum(leaf[0].size for leaf in jax.tree.leaves(members.params))

    began = time.perf_counter()
    number = jnp.array(0)
    epoch = make_epoch(model, row.batch_size, row.epochs, num_rows).lower(members, number, data.train).compile()
    # As many tokens at a time as in training, whatever the tests' lengths.
    tests = {
        name: make_test(model, max(1, row.batch_size * length // examples.tokens.shape[1]))
        .lower(members.params, examples)
        .compile()
        for name, examples in data.tests.items()
    }
    compiled = time.perf_counter()

    curve, losses, scores, done = [], [], {}, 0
    for done in range(1, row.epochs + 1):
        members, loss = epoch(members, number + done, data.train)
        scores = {
            name: np.array(test(members.params, data.tests[name]), np.float64).tolist() for name, test in tests.items()
        }
        accuracies = np.mean([accuracy for accuracy, _ in scores.values()], axis=0)
        curve.append(accuracies.tolist())
        losses.append(np.array(loss, np.float64).tolist())
        shown = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        say(f"{row.name}: epoch {done}, loss {np.min(loss):.3f}, {shown}, {time.perf_counter() - compiled:.0f} s")
        if enough(accuracies) >= row.stop_at:
            break
    found = {
        "row": dataclasses.asdict(row),
        "accuracies": curve[-1],
        "scores": {name: {"accuracy": accuracy, "exact": exact} for name, (accuracy, exact) in scores.items()},
        "curve": curve,
        "losses": losses,
        "reached": bool(enough(curve[-1]) >= row.stop_at),
        "epochs": done,
        "steps": done * (num_rows // row.batch_size),
        "seconds": time.perf_counter() - compiled,
        "compile_seconds": compiled - began,
        "parameters": parameters,
        "state_bytes": cache_bytes(model.config, 1, length, dtype=model.execution.dtype),
        "digest": data.digest,
    } | origin(commit)
    keep_row(out, row.name, found)
    return found
