"""The chunked cross entropy is the plain one: sums, gradients, dtypes; and no array of it has all the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE
from support.models import model_of, params_of

from train.cross_entropy import cross_entropy, num_chunks
from train.step import weighted_sums
from twomamba_jax.ops import softmax_rows

BATCH, LENGTH, WIDTH, VOCAB = 4, 6, 8, 11


def plain(x, kernel, targets, weights):
    """Sums from all the logits at once."""
    logits = jnp.einsum("bte,ev->btv", x, kernel)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    hits = jnp.argmax(logits, -1) == targets
    return jnp.sum(losses * weights), jnp.sum(hits * weights), jnp.sum(weights)


def inputs(dtype):
    """Half of the targets are hits, and a quarter of them has no weight."""
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(BATCH, LENGTH, WIDTH)), random.normal(size=(WIDTH, VOCAB))
    targets = np.where(random.random((BATCH, LENGTH)) < 0.5, (x @ kernel).argmax(-1), random.integers(VOCAB))
    weights = random.integers(4, size=(BATCH, LENGTH))
    return *(jnp.asarray(array, dtype) for array in (x, kernel)), targets, jnp.asarray(weights, dtype)


def differentiate(function, *arguments):
    """Sums, and the gradients of 3 times the loss."""

    def scaled(x, kernel, *rest):
        sums = function(x, kernel, *rest)
        return 3 * sums[0], sums

    (_, sums), gradients = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(*arguments)
    return *sums, *gradients


@pytest.fixture(params=["of a CPU", "of a GPU"])
def rows(request, monkeypatch):
    """What the loss takes of each row of logits, in the passes of a CPU and in the one of a GPU."""
    if request.param == "of a GPU":
        monkeypatch.setattr(softmax_rows, "in_several_passes", softmax_rows.in_one_pass)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-14), *([(np.float32, 1e-6)] if EXHAUSTIVE else [])], ids=str
)
def test_equals_the_plain_one(dtype, tolerance):
    """Several chunks, the last of them not full, and one, of the shares of a mesh and of the whole batch."""
    with jax.enable_x64(dtype == np.float64):
        arguments = inputs(dtype)
        expected = jax.jit(functools.partial(differentiate, plain))(*arguments)
        assert 0 < expected[1] < expected[2]
        for chunk_size, shards in ((4, (2, 3)), (7, (1, 1)), (None, (1, 1)), (3, (2, 1)))[: None if EXHAUSTIVE else 2]:
            function = functools.partial(cross_entropy, chunk_size=chunk_size, shards=shards)
            both = jax.jit(lambda *x, function=function: (function(*x), differentiate(function, *x)))
            alone, differentiated = both(*arguments)
            assert len(differentiated) == 5
            for found, wanted in zip((*alone, *differentiated), (*expected[:3], *expected)):
                assert found.dtype == wanted.dtype == dtype
                np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_bfloat16_operands_are_summed_in_float32():
    """Against float32 with the same operands: only dl and dx are rounded, the sums and dW's own sum are not."""
    x, kernel, targets, weights = inputs(jnp.float32)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16).astype(jnp.float32)
    chunked = functools.partial(differentiate, lambda *arrays: cross_entropy(*arrays, 5))
    found = jax.jit(chunked)(x, kernel, targets, weights)
    expected = jax.jit(functools.partial(differentiate, plain))(x.astype(jnp.float32), kernel, targets, weights)
    assert [array.dtype for array in found] == [*[jnp.float32] * 3, jnp.bfloat16, jnp.float32]
    assert [float(part) for part in found[:3]] == pytest.approx([float(part) for part in expected[:3]], rel=1e-6)
    for gradient, wanted in zip(found[3:], expected[3:]):
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.usefixtures("rows")
def test_a_target_that_is_nearly_certain_keeps_its_loss():
    """Logits of 8192 and 9 less: log(1 + e^-9) = 1.2e-4, where float32 has steps of 1e-3 at 8192."""
    arguments = jnp.full((1, 1, 1), 8192.0), jnp.array([[1, 1 - 9 / 8192]]), jnp.array([[0]]), jnp.ones((1, 1))
    function = jax.jit(jax.value_and_grad(lambda *arrays: cross_entropy(*arrays).loss, argnums=1))
    loss, gradient = function(*arguments)
    assert float(loss) == pytest.approx(np.log1p(np.exp(-9)), rel=1e-2)
    np.testing.assert_allclose(gradient[0], np.array([-8192, 8192]) / (1 + np.exp(9)), rtol=1e-2)


@pytest.mark.usefixtures("rows")
def test_a_hit_is_the_first_of_the_largest_logits():
    x, kernel = np.ones((1, 3, 1), np.float32), np.array([[0, 2, 2, 1]], np.float32)
    targets, weights = np.array([[1, 2, 3]]), np.ones((1, 3), np.float32)
    assert float(jax.jit(lambda *arrays: cross_entropy(*arrays).correct)(x, kernel, targets, weights)) == 1


def test_chunks():
    """As many as asked for, or so that their logits take 256 MiB or as much as the head's gradient."""
    assert num_chunks(65_536, 1024, 32_000, 1000) == 66
    assert num_chunks(2048, 128, 512, None) == 1
    assert num_chunks(65_536, 1024, 32_000, None) == 32  # of 2048 tokens: 250 MiB
    assert num_chunks(65_536, 4096, 128_000, None) == 16  # of 4096, the width


@pytest.mark.parametrize("backward", [False, True])
def test_compiled_memory_has_no_room_for_the_logits(backward):
    """Of 1024 tokens, a vocabulary of 4096 and a width of 8: 16 MiB of logits, and three times that in one chunk."""
    shapes = ((4, 256, 8), jnp.float32), ((8, 4096), jnp.float32), ((4, 256), jnp.int32), ((4, 256), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def temporary(chunk_size):
        def function(*arrays):
            return cross_entropy(*arrays, chunk_size).loss

        function = jax.value_and_grad(function, argnums=(0, 1)) if backward else function
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 1024 * 4096
    assert temporary(1024) > logits
    assert temporary(64) < logits / 4


def test_the_model_s_own_logits_have_this_loss():
    model = model_of("linear")
    tokens, params = np.random.default_rng(0).integers(23, size=(2, 9)), params_of(model)
    batch = {"tokens": tokens, "targets": tokens[:, ::-1], "segment_ids": tokens // 20, "weights": 1.0 * tokens}

    @jax.jit
    def both(params):
        logits = model.apply({"params": params}, tokens, segment_ids=batch["segment_ids"])
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        sums = weighted_sums(model, params, batch, chunk_size=5)
        return jnp.sum(losses * batch["weights"]), sums.loss

    expected, loss = both(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
