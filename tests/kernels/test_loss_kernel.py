"""The kernel of a loss's row sums, against NumPy in float64, and the losses that take it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE
from support.hopper import on_hopper
from support.models import config_of
from support.traced import kernels

from pallas_kernels.elementwise import softmax
from pallas_kernels.interpreter import interpreted
from train.cross_entropy import cross_entropy
from train.sharding import MESH_AXES, RULES
from train.step import weighted_sums
from twomamba_jax import Execution, LanguageModel
from twomamba_jax.ops import dispatch, elementwise
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.softmax_rows import softmax_rows

KERNELS = Elementwise("mosaic_gpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each has several pieces of work."""
    monkeypatch.setattr(softmax, "programs_at_once", lambda: 2)


# (rows, vocabulary, pieces in a block): a row for each program and more; a block of a row, several whole ones, and a
# last one that begins in the one before, in its first piece or in its third.
LOSSES = [(5, 4100, 3), (1, 512, 8), (2, 516, 8), (4, 4096, 4), (3, 2564, 4)]


def rows_of(logits, targets):
    rows = softmax_rows(jnp.asarray(logits)[None, None], jnp.asarray(targets)[None, None], KERNELS)
    return jax.tree.map(lambda part: np.asarray(part)[0, 0], rows)


def check_rows(count, vocabulary):
    """Logits of any size, -inf among them, targets of every kind, and the first of equals on either side of a piece."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(count, vocabulary)) * np.resize([1, 1e3, 5e37, 10, 1], count)[:, None]
    logits, edge = logits.astype(np.float32), vocabulary // 512 * 512
    logits[0, 1:400], logits[0, [edge - 1, vocabulary - 1]], logits[-1, 1 : edge // 2] = -np.inf, 9, 5
    targets = random.integers(vocabulary, size=count)
    targets[0], targets[-1] = vocabulary - 1, 2

    largest, total, first, of_target = rows_of(logits, targets)
    assert np.array_equal(largest, logits.max(-1))
    assert np.array_equal(first, logits.argmax(-1))
    assert np.array_equal(of_target, logits[np.arange(count), targets])
    with np.errstate(over="ignore"):
        wanted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True)).sum(-1)
    # An exponential errs by 2 ulp, its argument by 2^-23 of itself; a thread adds up V / 512 of them.
    np.testing.assert_allclose(total, wanted, rtol=2.0**-23 * (4 + vocabulary / 512))


def check_what_is_not_finite(vocabulary):
    """Of NaN in a row, at its end and at its start, of inf and of nothing but -inf: no finite loss."""
    logits = np.zeros((6, vocabulary), np.float32)
    logits[0, 3], logits[1, -1], logits[2, 0], logits[3, 5], logits[4] = np.nan, np.nan, np.nan, np.inf, -np.inf
    rows = rows_of(logits, np.zeros(6, np.int32))
    with np.errstate(all="ignore"):
        loss = np.log(rows.total) - (rows.of_target - rows.largest)
    assert np.isfinite(loss).tolist() == [False] * 5 + [True]
    # A target that is no token is not read: past the end of the array there is none.
    assert not rows_of(logits[:2], np.array([-1, vocabulary])).of_target.any()


@pytest.mark.parametrize("case", LOSSES if EXHAUSTIVE else LOSSES[:1], ids=str)
def test_rows_of_logits(case, monkeypatch):
    *sizes, pieces = case
    monkeypatch.setattr(softmax, "PIECES", pieces)
    with interpreted():
        check_rows(*sizes)


def test_rows_that_are_not_finite():
    with interpreted():
        check_what_is_not_finite(516)


@on_hopper
@pytest.mark.parametrize("case", [*LOSSES, (2049, 32000, 8), (3, 50288, 8)], ids=str)
def test_rows_of_logits_on_a_gpu(case, monkeypatch):
    *sizes, pieces = case
    monkeypatch.setattr(softmax, "PIECES", pieces)
    check_rows(*sizes)
    check_what_is_not_finite(sizes[1])


def test_a_loss_with_the_kernel_is_that_without():
    """In several chunks, the last of them not full, and with its gradients."""
    random = np.random.default_rng(0)
    x, head = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 5, 8), (8, 516)))
    targets, weights = random.integers(516, size=(2, 5)), jnp.arange(10.0).reshape(2, 5)

    def run(elementwise):
        def loss(x, head):
            sums = cross_entropy(x, head, targets, weights, 4, (1, 1), elementwise)
            return sums.loss, sums

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, head)

    want = run(Elementwise("xla"))
    with interpreted():
        got = run(KERNELS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def losses_of(vocabulary, mesh=(1, 1, 1, 1), shards=(1, 1), **execution):
    """The kernels of a loss of 4 rows of 8 tokens, in two chunks, each with the shape of its first operand."""
    model = LanguageModel(config_of("linear", vocab_size=vocabulary), Execution(**execution))
    batch = {name: jax.ShapeDtypeStruct((4, 8), jnp.int32) for name in ("tokens", "targets", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    params = jax.eval_shape(lambda tokens: nn.unbox(model.init(jax.random.key(0), tokens))["params"], batch["tokens"])
    mesh = AbstractMesh(mesh, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    chunk_size = 16 // (shards[0] * shards[1])
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        return kernels("softmax_rows", lambda *x: weighted_sums(model, *x, chunk_size, shards).loss, params, batch)


def test_a_loss_takes_it_in_its_chunks(monkeypatch):
    """On each device, of its tokens and the whole vocabulary; where asked, for vocabularies that it is for."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    monkeypatch.setattr(dispatch, "choose", lambda *_: ("parallel", "xla"))
    assert losses_of(512) == [("softmax_rows", (16, 512))]
    assert losses_of(512, (2, 1, 1, 1), (2, 1)) == [("softmax_rows", (8, 512))]
    assert losses_of(512, (1, 1, 1, 2), (1, 2)) == [("softmax_rows", (8, 512))]
    reasons = []
    monkeypatch.setattr(elementwise, "_log_choice", lambda *choice: reasons.append(choice[2]))
    assert losses_of(512, (1, 1, 2, 1)) == []
    assert "it is for a device that has all tokens of the vocabulary" in reasons
    assert losses_of(512, elementwise_kernels=False) == []
    assert losses_of(512, implementation="xla") == []
    assert losses_of(514) == losses_of(508) == []


def test_a_loss_traces_in_float64_mode(monkeypatch):
    """The kernel counts in 32 bits there too."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    with jax.enable_x64(True):
        arrays = jnp.ones((1, 7, 8), jnp.float32), jnp.ones((8, 512), jnp.float32), jnp.zeros((1, 7), jnp.int64)
        sums = jax.eval_shape(lambda *x: cross_entropy(*x, x[0][..., 0], elementwise=KERNELS), *arrays)
    assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}


def test_logits_of_float32_alone_have_a_kernel():
    with interpreted():
        for dtype, module in ((jnp.float32, softmax), (jnp.bfloat16, None)):
            assert KERNELS.kernels("loss", (jax.ShapeDtypeStruct((2, 512), dtype), PartitionSpec())) is module
