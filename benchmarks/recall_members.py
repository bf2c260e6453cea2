"""Members of a grid that differ in learning rate and seed alone, trained at once: one jitted epoch, mapped over them.

The rows lie on the device. An epoch is a loop over steps, each a batch of rows in an order of the member's own. Logits
are made where a target has a weight, and nowhere else: of MQAR at T 256 and 16 pairs, of one position in 16.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.cross_entropy import cross_entropy
from train.data.rows import Rows
from train.schedules import make_schedule
from train.step import make_optimizer
from twomamba_jax import Execution, LanguageModel, ModelConfig, parse_pattern
from twomamba_jax.layers.language_model import head_kernel, head_logits

Array = jax.Array
NUM_LAYERS = 2
# zoology's optimiser: AdamW as PyTorch has it, with this decay of every parameter, without warm-up or clipping.
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": None}


class Examples(NamedTuple):
    """Rows as arrays: `tokens` [N, T], and of the up to Q targets of a row that have a weight, [N, Q], the rest 0."""

    tokens: Any
    positions: Any
    targets: Any
    weights: Any


class Members(NamedTuple):
    """M models in training; every leaf has M in front."""

    learning_rates: Array
    keys: Array
    params: Any
    opt_state: Any


def make_model(variant: str, d_model: int, vocab_size: int, dtype: str) -> LanguageModel:
    """Two layers of one head as wide as the model, without MLPs, as zoology has them.

    With one head, a variant with half-lives from 1 to 1,024 tokens starts at their geometric mean, 32.
    """
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=NUM_LAYERS,
        num_heads=1,
        head_dim=d_model,
        mlp_dim=0,
        mixers=parse_pattern(variant, NUM_LAYERS),
    )
    # Not the kernels, which take bfloat16 and heads of 64 or 128. The parallel form has T^2 weights a row: at T 256,
    # from d_model 64 on, less than one state of squared scores, d_model^3 / 2 numbers.
    return LanguageModel(config, Execution(dtype=dtype, form="parallel", implementation="xla"))


def make_examples(rows: Rows) -> Examples:
    """All of the rows, on the host. They have equally many tokens, and causal models never see what is at the right."""
    made = [rows[index] for index in range(len(rows))]
    tokens = np.stack([row["tokens"] for row in made])
    places = [np.flatnonzero(row["weights"]) for row in made]
    positions, targets = np.zeros((2, len(made), max(map(len, places))), np.int32)
    weights = np.zeros(positions.shape, np.float32)
    for number, (row, found) in enumerate(zip(made, places)):
        positions[number, : len(found)] = found
        targets[number, : len(found)] = row["targets"][found]
        weights[number, : len(found)] = row["weights"][found]
    return Examples(tokens, positions, targets, weights)


def states_at_targets(model: LanguageModel, params: Any, batch: Examples) -> Array:
    """The hidden states [B, Q, E] that the head takes, where targets have a weight."""
    x = model.apply({"params": params}, batch.tokens, apply_head=False)
    return jnp.take_along_axis(x, batch.positions[..., None], axis=1)


def make_members(model: LanguageModel, members: Sequence[tuple[float, int]]) -> Members:
    """New members of these learning rates and seeds."""
    rates = jnp.array([rate for rate, _ in members], jnp.float32)
    keys = jax.vmap(jax.random.key)(jnp.array([seed for _, seed in members]))

    @jax.jit
    @jax.vmap
    def init(key: Array) -> tuple[Any, Any]:
        params = nn.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])
        return params, _optimizer(0.0, 1).init(params)

    return Members(rates, keys, *init(keys))


def make_epoch(model: LanguageModel, batch_size: int, epochs: int, num_rows: int) -> Callable:
    """The jitted `epoch(members, number, examples) -> (members, losses [M])`; the old members are donated.

    Learning rates fall to 0 over `epochs` epochs by a cosine. A last batch that is not full is left out. `losses` are
    the means over the epoch's steps.
    """
    steps = num_rows // batch_size

    def epoch(rate, key, params, opt_state, number, examples):
        optimizer = _optimizer(rate, steps * epochs)
        order = jax.random.permutation(jax.random.fold_in(key, number), num_rows)[: steps * batch_size]

        def loss(params, batch):
            x = states_at_targets(model, params, batch)
            sums = cross_entropy(x, head_kernel(params), batch.targets, batch.weights)  # by XLA: `vmap` over members
            return sums.loss / jnp.sum(batch.weights)

        def step(state, indices):
            params, opt_state = state
            batch = Examples(*(array[indices] for array in examples))
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        state, losses = jax.lax.scan(step, (params, opt_state), order.reshape(steps, batch_size))
        return *state, jnp.mean(losses)

    mapped = jax.vmap(epoch, in_axes=(0, 0, 0, 0, None, None))

    @functools.partial(jax.jit, donate_argnums=0)
    def all_epochs(members: Members, number: Array, examples: Examples) -> tuple[Members, Array]:
        *state, losses = mapped(*members, number, examples)
        return Members(members.learning_rates, members.keys, *state), losses

    return all_epochs


def make_test(model: LanguageModel, batch_size: int) -> Callable:
    """The jitted `test(params, examples) -> (accuracy [M], exact [M])`, means over rows.

    Of each row, `accuracy` is the share of its targets that are the likeliest token, and `exact` whether all are.
    """

    def hits(params, row: Examples) -> Array:
        batch = Examples(*(array[None] for array in row))
        logits = head_logits(states_at_targets(model, params, batch), head_kernel(params))
        return jnp.sum(row.weights * (jnp.argmax(logits[0], axis=-1) == row.targets))

    def test(params, examples: Examples) -> tuple[Array, Array]:
        found = jax.lax.map(functools.partial(hits, params), examples, batch_size=batch_size)
        targets = jnp.sum(examples.weights, axis=1)
        return jnp.mean(found / targets), jnp.mean(found == targets)

    return jax.jit(jax.vmap(test, in_axes=(0, None)))


def _optimizer(rate: Any, steps: int) -> optax.GradientTransformation:
    return make_optimizer(make_schedule("cosine", rate, warmup_steps=0, decay_steps=steps), **ADAMW)
