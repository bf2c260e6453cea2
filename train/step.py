"""One training step and one evaluation step: `jax.jit` with shardings over the mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.accumulation import Batch, sum_over_microbatches
from train.cross_entropy import Sums, cross_entropy
from train.sharding import batch_sharding, token_shards, tree_shardings
from twomamba_jax.layers import head_kernel

Array = jax.Array


class TrainState(NamedTuple):
    """Everything that a step changes: the parameters, the optimiser's state, and int32 counts.

    `step`: steps made, those included that were skipped since their loss or gradient was not finite; `skipped`: these;
    `skipped_in_a_row`: these since the last that was not.
    """

    step: Array
    params: Any
    opt_state: Any
    skipped: Array
    skipped_in_a_row: Array


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float | None
) -> optax.GradientTransformation:
    """AdamW that decays every parameter, as the paper's runs did; gradients are clipped to `clip_norm` first."""
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return adamw if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def weighted_sums(
    model: nn.Module, params: Any, batch: Batch, chunk_size: int | None = None, shards: tuple[int, int] = (1, 1)
) -> Sums:
    """Runs the model on `batch` (see train/data/rows.py) and sums over the targets by their weights.

    `chunk_size` and `shards` are those of `cross_entropy`; `model.execution` says whether the loss has kernels, too.
    """
    x = model.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"], apply_head=False)
    elementwise = model.execution.elementwise("vocab")
    return cross_entropy(x, head_kernel(params), batch["targets"], batch["weights"], chunk_size, shards, elementwise)


def first_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of a run before its first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def make_begin(optimizer: optax.GradientTransformation, abstract: TrainState) -> Callable[[Any], TrainState]:
    """The jitted `begin(params) -> state` of a run that starts from given parameters, which are donated.

    `abstract` is the state as ShapeDtypeStructs with shardings.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda params: first_state(params, optimizer), out_shardings=shardings, donate_argnums=0)


def make_init(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[[Array], TrainState], TrainState]:
    """The jitted `init(key) -> state`, and its result as ShapeDtypeStructs that carry their shardings."""

    def boxed_init(key: Array) -> TrainState:
        # Parameters do not depend on the length of the example; 8 is short and no special case.
        return first_state(model.init(key, jnp.zeros((1, 8), jnp.int32))["params"], optimizer)

    key = jax.random.key(0)
    shardings = tree_shardings(jax.eval_shape(boxed_init, key), mesh)
    init = jax.jit(lambda key: nn.unbox(boxed_init(key)), out_shardings=shardings)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(init, key),
        shardings,
    )
    return init, abstract


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
    chunk_size: int | None = None,
    microbatches: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted `step(state, batch) -> (state, metrics)`; the old state is donated.

    `state` gives the shardings (abstract will do), `chunk_size` is that of `cross_entropy`, `compiler_options` are
    those of `jax.jit`. The loss is sum(weight * nll) / sum(weight) over the whole batch, in however many
    `microbatches`. Where the loss or the norm of its gradient is not finite, nothing but the counts of the state
    changes.
    metrics: loss, accuracy, grad_norm (before clipping), learning_rate, float32 scalars; skipped and skipped_in_a_row,
    those of the new state.
    """

    shards, shardings = token_shards(mesh), jax.tree.map(lambda leaf: leaf.sharding, state)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        # A batch may hold no weight at all (documents of one byte, say): its loss is 0, not NaN.
        weight = jnp.maximum(jnp.sum(batch["weights"]), 1)

        batch = batch | {"weights": batch["weights"] / weight}  # so that sums are the whole batch's means

        def loss_and_sums(params: Any, microbatch: Batch) -> tuple[Array, Sums]:
            sums = weighted_sums(model, params, microbatch, chunk_size, shards)
            return sums.loss, sums

        def gradients_and_sums(microbatch: Batch) -> tuple[Any, Sums]:
            gradients, sums = jax.grad(loss_and_sums, has_aux=True)(state.params, microbatch)
            return jax.lax.with_sharding_constraint(gradients, shardings.params), sums

        gradients, means = sum_over_microbatches(gradients_and_sums, batch, microbatches, shards[0])
        loss = means.loss
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics = {
            "loss": loss,
            "accuracy": means.correct,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),  # the optimiser's own count: it saw no others
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
        }
        return TrainState(state.step + 1, params, opt_state, skipped, in_a_row), metrics

    replicated = NamedSharding(mesh, P())
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=None if compiler_options is None else dict(compiler_options),
    )


def make_eval_step(
    model: nn.Module, state: TrainState, mesh: Mesh, chunk_size: int | None = None, microbatches: int = 1
) -> Callable[[Any, Batch], Sums]:
    """The jitted `step(params, batch) -> Sums`, so that batches add up by their weights."""
    shards, shardings = token_shards(mesh), jax.tree.map(lambda leaf: leaf.sharding, state.params)

    def eval_step(params: Any, batch: Batch) -> Sums:
        def sums(microbatch: Batch) -> Sums:
            return weighted_sums(model, params, microbatch, chunk_size, shards)

        return sum_over_microbatches(sums, batch, microbatches, shards[0])

    return jax.jit(
        eval_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )
