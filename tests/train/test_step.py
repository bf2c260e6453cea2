"""The optimiser, the weighted loss and what one step changes."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import Bigram, model_of

from train.cross_entropy import Sums
from train.errors import UserError
from train.evaluation import evaluate
from train.schedules import make_schedule
from train.sharding import RULES, make_mesh
from train.step import make_init, make_optimizer, make_train_step, weighted_sums

SIZES = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


def batch(seed: int = 0, shape: tuple[int, int] = (3, 4)):
    random = np.random.default_rng(seed)
    return {
        "tokens": random.integers(5, size=shape).astype(np.int32),
        "targets": random.integers(5, size=shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "weights": random.integers(2, size=shape).astype(np.float32),
    }


def test_adamw_decays_every_parameter_at_the_rate_of_its_step():
    """The schedule counts from 0."""
    params = {"norm": np.ones(3, np.float32), "kernel": np.ones((2, 2), np.float32)}
    options = {"b1": 0.9, "b2": 0.999, "eps": 1e-7, "weight_decay": 0.01, "clip_norm": None}
    optimizer = make_optimizer(lambda count: 0.1 * (1 + count), **options)
    gradients, state = jax.tree.map(np.zeros_like, params), jax.jit(optimizer.init)(params)
    one_step = jax.jit(optimizer.update)
    for rate in (0.1, 0.2):
        updates, state = one_step(gradients, state, params)
        for update in jax.tree.leaves(updates):
            np.testing.assert_allclose(update, -rate * 0.01, rtol=1e-6)


def test_loss_is_weighted_by_token():
    params = {"head": jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)), jnp.float32)}
    data = batch()
    sums = weighted_sums(Bigram(), params, data)
    logits = np.asarray(params["head"], np.float64)[data["tokens"]]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    assert float(sums.loss) == pytest.approx((nll * data["weights"]).sum(), rel=1e-6)
    assert float(sums.correct) == ((logits.argmax(-1) == data["targets"]) * data["weights"]).sum()
    assert float(sums.weight) == data["weights"].sum()


def make(clip_norm=None, rate=0.1, model=None, microbatches=1):
    mesh, model = make_mesh(SIZES), model or Bigram()
    schedule = make_schedule("linear", rate, 0, 10)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.999, eps=1e-7, weight_decay=0.01, clip_norm=clip_norm)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        init, abstract = make_init(model, optimizer, mesh)
        return (
            init,
            abstract,
            make_train_step(model, optimizer, schedule, abstract, mesh, microbatches=microbatches),
            optimizer,
        )


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_a_step_is_the_optimizer_applied_to_the_gradient_of_the_mean(clip_norm):
    init, abstract, train_step, optimizer = make(clip_norm)
    state = init(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    params = jax.tree.map(jnp.copy, state.params)
    data = batch()

    def loss(params):
        logits = params["head"][data["tokens"]]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1)[..., 0]
        return jnp.sum(nll * data["weights"]) / jnp.sum(data["weights"])

    @jax.jit
    def by_hand(params):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return value, jnp.linalg.norm(gradients["head"]), optax.apply_updates(params, updates)

    value, norm, expected = by_hand(params)
    state, metrics = train_step(state, data)
    np.testing.assert_allclose(state.params["head"], expected["head"], rtol=1e-5, atol=1e-7)
    assert int(state.step) == 1
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1)


def test_the_old_state_is_donated():
    init, _, train_step, _ = make()
    old = init(jax.random.key(0))
    train_step(old, batch())
    assert old.params["head"].is_deleted()


def test_a_batch_without_weights_changes_nothing_but_by_decay():
    init, _, train_step, _ = make()
    state = init(jax.random.key(0))
    before = np.asarray(state.params["head"])
    state, metrics = train_step(state, {**batch(), "weights": np.zeros((3, 4), np.float32)})
    assert float(metrics["loss"]) == 0
    np.testing.assert_allclose(state.params["head"], before * (1 - 0.1 * 0.01), rtol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_step_that_is_not_finite_changes_the_counts_alone(microbatches):
    """Good, bad, bad, good: the end is that of the good ones alone, bit for bit, and so is the learning rate."""
    init, _, train_step, _ = make(clip_norm=1.0, microbatches=microbatches)
    bad = batch(1)
    bad["weights"][1] = np.nan
    expected = init(jax.random.key(0))
    for seed in (0, 2):
        expected, good_metrics = train_step(expected, batch(seed))
    state, counts = init(jax.random.key(0)), []
    for data in (batch(0), bad, bad, batch(2)):
        state, metrics = train_step(state, data)
        counts.append([int(count) for count in (state.step, state.skipped, state.skipped_in_a_row)])
        assert bool(jnp.isfinite(metrics["loss"])) == (data is not bad)
        assert [int(metrics[key]) for key in ("skipped", "skipped_in_a_row")] == counts[-1][1:]
    assert counts == [[1, 0, 0], [2, 1, 1], [3, 2, 2], [4, 2, 0]]
    for found, wanted in zip(jax.tree.leaves(state[1:3]), jax.tree.leaves(expected[1:3]), strict=True):
        assert np.array_equal(found, wanted)
    assert float(metrics["learning_rate"]) == float(good_metrics["learning_rate"])


def test_a_gradient_that_overflows_is_skipped():
    """Gradients are 1e25 times those of the same logits at scale 1: finite, but not their squares' sum."""
    init, _, train_step, _ = make(model=Bigram(1e25), clip_norm=1.0)
    state = init(jax.random.key(0))
    before = np.asarray(state.params["head"])
    state, metrics = train_step(state, {**batch(), "weights": np.ones((3, 4), np.float32)})
    assert np.isfinite(metrics["loss"])
    assert np.isinf(metrics["grad_norm"])
    assert int(state.skipped) == 1
    assert np.array_equal(state.params["head"], before)


def test_evaluation_weights_by_token_across_batches():
    sums = {"a": Sums(6.0, 2.0, 3.0), "b": Sums(4.0, 0.0, 1.0)}
    figures = evaluate(lambda _, name: sums[name], None, ["a", "b"], targets_per_byte=0.25)
    assert figures == pytest.approx(
        {
            "eval/loss": 2.5,
            "eval/accuracy": 0.5,
            "eval/perplexity": np.exp(2.5),
            "eval/bits_per_byte": 2.5 / np.log(2) / 4,
        }
    )
    with pytest.raises(UserError, match="no token to predict"):
        evaluate(lambda *_: Sums(0.0, 0.0, 0.0), None, ["a"], 1.0)


def test_a_bfloat16_step_has_float32_where_the_contract_says():
    """Decays, normalisers, norms, loss, gradients and moments are float32, and the large products are not."""
    model, mesh = model_of("softmax,2mamba,mamba2", 3, dtype=jnp.bfloat16), make_mesh(SIZES)
    optimizer = make_optimizer(lambda _: 0.1, b1=0.9, b2=0.999, eps=1e-7, weight_decay=0.01, clip_norm=None)
    _, abstract = make_init(model, optimizer, mesh)
    step = make_train_step(model, optimizer, lambda _: 0.1, abstract, mesh)
    jaxpr, results = jax.make_jaxpr(step, return_shape=True)(abstract, batch(shape=(2, 13)))
    made = collections.Counter(re.findall(r":(\w+)\[[\d,]*\] = (\w+)", str(jaxpr)))
    for name in ("exp", "log", "log1p", "rsqrt", "div"):
        assert made["f32", name] > 0, name
        assert made["bf16", name] == 0, name
    # Forward and two backward of seven projections or more in each layer.
    assert made["bf16", "dot_general"] >= 3 * 7 * 3
    floating = {leaf.dtype for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floating == {jnp.dtype("float32")}
