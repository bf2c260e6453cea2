"""Packed training is training on the documents one by one: loss, gradients, and nothing across a boundary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE
from support.models import params_of

from train.data.rows import DocumentRows, PackedRows
from train.data.tokenized import Split
from train.step import weighted_sums
from twomamba_jax import Execution, LanguageModel, ModelConfig, parse_pattern

# Four documents in one row. Each has input tokens that the others lack; END is an input of none.
SIZES = (7, 1, 12, 3)
END = 40
DOCUMENTS = [np.append(np.arange(size) % 9 + 10 * number, END) for number, size in enumerate(SIZES)]
LENGTH = sum(SIZES) + len(SIZES) - 1


@functools.cache
def loss_and_gradients(name: str, form: str | None):
    """The jitted loss and gradients of a tiny model of one variant, and its parameters, all float64."""
    config = ModelConfig(
        vocab_size=41, d_model=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=16, mixers=parse_pattern(name, 1)
    )
    execution = Execution(
        dtype=jnp.float64, param_dtype=jnp.float64, form=form, chunk_size=8 if form == "chunked" else None
    )
    model = LanguageModel(config, execution)
    function = jax.jit(jax.value_and_grad(lambda params, batch: weighted_sums(model, params, batch).loss))
    return function, params_of(model, scale=0.3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def stack(rows):
    return {key: np.stack([row[key] for row in rows]).astype(rows[0][key].dtype) for key in rows[0]}


def split() -> Split:
    return Split(np.concatenate(DOCUMENTS), np.cumsum([0, *(one.size for one in DOCUMENTS)]), sum(SIZES))


def packed_batch():
    """The four documents in row 0; the other rows are the same without weight, to have one shape for both."""
    rows = PackedRows(split(), LENGTH, END)
    assert len(rows) == 1
    return stack([rows[0], *[{**rows[0], "weights": 0 * rows[0]["weights"]}] * 3])


NAMED = ("softmax", "linear", "mamba2", "mamba2s", "2mamba", "2mamba-e")
CASES = [("2mamba", "chunked"), *((name, None) for name in (NAMED if EXHAUSTIVE else ()))]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_packed_equals_separate_and_no_gradient_crosses(name, form):
    function, params = loss_and_gradients(name, form)
    separate = DocumentRows(split(), LENGTH, END)
    loss, gradients = function(params, packed_batch())
    expected_loss, expected = function(params, stack([separate[index] for index in range(4)]))
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    for leaf, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-12 * np.abs(other).max())

    # With the targets of one document alone, the embeddings of the others get nothing at all.
    for number in (1, 2):
        batch = packed_batch()
        batch["weights"] = batch["weights"] * (batch["segment_ids"] == number + 1)
        assert batch["weights"].sum() == SIZES[number]
        _, gradients = function(params, batch)
        table = np.asarray(gradients["embedding"]["embedding"])
        own = np.unique(DOCUMENTS[number][:-1])
        assert np.abs(table[own]).min(axis=0).max() > 0
        assert np.abs(np.delete(table, own, axis=0)).max() == 0
