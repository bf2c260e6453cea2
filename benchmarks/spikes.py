"""Which tokens the spikes of a gradient come from: `python benchmarks/spikes.py --data FILES --above 5`.

Trains a model of text, and at each step whose gradient has a norm above --above shows, of every layer and head, the
tokens with the largest gradient of their query: how many times the median of the layer and head it is, what share of
all squares of the head's, and how well the query is aligned with the keys that it sees,

    cos2_i = sum_j L_ij <q_i, k_j>^2 / (|q_i|^2 sum_j L_ij |k_j|^2),   L the decay,

which of random keys is 1 / K. A normalised squared score divides by the first of these sums.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import clone  # noqa: F401
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from train.configuration import apply_overrides, validate
from train.data.rows import Batch, training_batches
from train.errors import UserError
from train.loop import Run, build
from train.sharding import RULES, make_mesh
from train.step import weighted_sums
from twomamba_jax.layers import mixer

TEXT = 12  # tokens that are shown with one


class Queries(NamedTuple):
    """Of every query [layers, B, T, H]: the norm of its gradient, and cos2."""

    gradients: np.ndarray
    alignments: np.ndarray


def alignment(q: jax.Array, k: jax.Array, log_decay: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """cos2 [B, T, H] of queries and keys [B, T, H, K] with log_decay [B, T, H]."""
    sums, tokens = jnp.cumsum(log_decay, axis=1), jnp.arange(q.shape[1])
    seen = (tokens[:, None] >= tokens)[None, :, :, None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None])[..., None]
    decay = jnp.exp(jnp.where(seen, sums[:, :, None] - sums[:, None], -jnp.inf))
    along = jnp.sum(decay * jnp.einsum("bihk,bjhk->bijh", q, k) ** 2, axis=2)
    return along / (jnp.sum(q * q, -1) * jnp.einsum("bijh,bjh->bih", decay, jnp.sum(k * k, -1)))


def watch_queries(run: Run) -> Callable[[Any, Batch], Queries]:
    """`watch(params, batch)`: what the batch's loss says of the queries of each layer."""
    found = []

    @jax.custom_vjp
    def watched(q: jax.Array, cos2: jax.Array) -> jax.Array:
        return q

    def backward(cos2: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda *arrays: found.append(arrays), jnp.linalg.norm(gradient, axis=-1), cos2, ordered=True)
        return gradient, jnp.zeros_like(cos2)

    watched.defvjp(lambda q, cos2: (q, cos2), backward)
    attention = mixer.decay_attention

    def watched_attention(q, k, v, log_decay, **options):
        cos2 = jax.lax.stop_gradient(alignment(q, k, log_decay, options["segment_ids"]))
        return attention(watched(q, cos2), k, v, log_decay, **options)

    @jax.jit
    def gradient(params: Any, batch: Batch) -> Any:
        batch = batch | {"weights": batch["weights"] / jnp.sum(batch["weights"])}
        return jax.grad(lambda params: weighted_sums(run.model, params, batch).loss)(params)

    def watch(params: Any, batch: Batch) -> Queries:
        found.clear()
        with mock.patch.object(mixer, "decay_attention", watched_attention):
            jax.block_until_ready(gradient(params, batch))
        jax.effects_barrier()
        # The backward pass meets the last layer first.
        return Queries(*(np.stack(arrays[::-1]) for arrays in zip(*found)))

    return watch


def table(queries: Queries, tokens: np.ndarray, count: int) -> list[str]:
    """Lines of the `count` tokens with the largest gradients in all layers and heads."""
    gradients, alignments = queries
    medians, squares = np.median(gradients, (1, 2)), np.sum(gradients**2, (1, 2))
    lines = []
    for index in np.argsort(-gradients, axis=None)[:count]:
        layer, row, token, head = np.unravel_index(index, gradients.shape)
        largest = gradients[layer, row, token, head]
        text = bytes(byte & 255 for byte in tokens[row, max(0, token + 1 - TEXT) : token + 1].tolist())
        lines.append(
            f"| {layer} | {head} | {largest / medians[layer, head]:,.0f} | {largest**2 / squares[layer, head]:.2f} "
            f"| {alignments[layer, row, token, head]:.1e} | {np.median(alignments[layer, ..., head]):.1e} | {text!r} |"
        )
    return lines


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        "python benchmarks/spikes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="FILES", help="of text, as data.paths of a configuration")
    add("--variant", default="2mamba-dt-long", metavar="NAME", help="a name of VARIANTS, or a pattern; with a decay")
    add("--size", choices=base.SIZES, default="nano")
    add("--learning_rate", type=float, default=4e-3)
    add("--steps", type=int, default=500, help="that the learning rate falls over")
    add("--until", type=int, help="the last step that is made; default: all")
    add("--above", type=float, default=5.0, metavar="NORM")
    add("--tokens", type=int, default=6, help="shown of each of these steps")
    options = parser.parse_args(arguments)
    config = base.get_config("spikes", options.variant, options.size).lock()
    values = {"data.source": "files", "data.paths": options.data, "steps": options.steps}
    values |= {"optimizer.learning_rate": options.learning_rate, "execution.implementation": "xla"}
    try:
        apply_overrides(config, [(key, str(value)) for key, value in values.items()])
        validate(config)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            train(build(config, Path(), mesh), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(run: Run, options: argparse.Namespace) -> None:
    """Makes the steps, and prints the table of each that has a spike."""
    watch = watch_queries(run)
    batches = training_batches(run.task.train, run.config.batch_size, run.config.seed, *run.rows)
    state = run.init(jax.random.key(run.config.seed))
    print("| layer | head | times the median | share of squares | cos2 | its median | text |")
    print("|---|---|---|---|---|---|---|")
    for step in range(1, (options.until or options.steps) + 1):
        batch = next(batches)
        before = jax.tree.map(jnp.copy, state.params)  # the step donates its state
        state, metrics = run.train_step(state, run.place(batch))
        if (norm := metrics["grad_norm"].item()) > options.above:
            print(f"step {step}, loss {metrics['loss'].item():.3f}, gradient norm {norm:.2f}")
            print("\n".join(table(watch(before, run.place(batch)), batch["tokens"], options.tokens)), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
