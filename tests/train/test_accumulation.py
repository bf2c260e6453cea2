"""A batch in microbatches has the loss, the gradient and the hits of the batch in one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.exhaustive import EXHAUSTIVE
from support.models import Bigram

from train.accumulation import sum_over_microbatches
from train.sharding import RULES, make_mesh
from train.step import make_eval_step, make_init, make_train_step

# Of SGD, large enough that the rounding of the parameters is nothing beside their change.
RATE = 2.0**10


def batch(dtype):
    """Eight rows of 32, in two documents. Of four microbatches the token counts are unequal, and that of one is 0."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(5, size=(2, 8, 32)).astype(np.int32)
    counts = np.array([32, 20, 7, 30, 0, 0, 1, 2])[:, None]
    segment_ids = np.broadcast_to(np.arange(32) // 20, (8, 32)).astype(np.int32)
    weights = (np.arange(32) < counts).astype(dtype)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids, "weights": weights}


DTYPES = [(np.float64, 1e-13), *([(np.float32, 1e-5)] if EXHAUSTIVE else [])]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=lambda x: getattr(x, "__name__", ""))
def test_four_microbatches_of_unequal_counts_are_the_one_big_batch(dtype, tolerance):
    """Loss, accuracy, and every gradient (from what SGD makes of it); and the sums of an evaluation in microbatches."""
    model, optimizer = Bigram(), optax.sgd(RATE)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})
    with jax.enable_x64(dtype == np.float64), jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        init, abstract = make_init(model, optimizer, mesh)
        state, data = init(jax.random.key(0)), batch(dtype)
        before = jax.tree.map(np.asarray, state.params)
        sums = make_eval_step(model, abstract, mesh, microbatches=4)(state.params, data)

        def step(microbatches):
            options = {"chunk_size": 50, "microbatches": microbatches}
            train_step = make_train_step(model, optimizer, lambda _: RATE, abstract, mesh, **options)
            after, metrics = train_step(jax.tree.map(jnp.copy, state), data)
            return metrics, jax.tree.map(lambda old, new: (old - np.asarray(new)) / RATE, before, after.params)

        found, expected = step(4), step(1)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    metrics = expected[0]
    assert float(sums.weight) == 92
    assert float(sums.loss) == pytest.approx(92 * float(metrics["loss"]), rel=10 * tolerance)
    assert float(sums.correct) == pytest.approx(92 * float(metrics["accuracy"]), rel=10 * tolerance)


def test_sums_are_float32_and_rows_stay_with_their_device():
    """256 + 1 + ... + 1 is 256 in bfloat16; of two devices' rows, each microbatch has one of each."""
    tokens = jnp.arange(8)[:, None]
    rows = {"tokens": tokens, "value": jnp.array([256, 1, 1, 1, 0, 0, 0, 1], jnp.bfloat16)[:, None]}
    seen = sum_over_microbatches(
        lambda part: (jnp.sum(part["value"]), jnp.zeros(8).at[part["tokens"][0, 0]].add(part["tokens"][1, 0])),
        rows, 4, row_shards=2,
    )  # fmt: skip
    assert (float(seen[0]), seen[0].dtype) == (260, jnp.bfloat16)
    assert seen[1].tolist() == [4, 5, 6, 7, 0, 0, 0, 0]


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch_size=8 must be a multiple of microbatches x .* = 3 x 2"):
        sum_over_microbatches(lambda part: part, batch(np.float32), 3, row_shards=2)
