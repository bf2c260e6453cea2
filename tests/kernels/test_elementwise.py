"""The kernels between products: of backward passes against autodiff in float32, of the loss against NumPy."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.hopper import on_hopper
from support.models import config_of
from support.traced import kept, kernels

from pallas_kernels.elementwise import convolution, norm, softmax
from pallas_kernels.interpreter import interpreted
from train.cross_entropy import cross_entropy
from train.sharding import MESH_AXES, RULES
from train.step import weighted_sums
from twomamba_jax import Execution, LanguageModel
from twomamba_jax.layers import Block
from twomamba_jax.layers.execution import DEAR
from twomamba_jax.ops import dispatch, elementwise
from twomamba_jax.ops.convolution import causal_convolution
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.joint_convolution import can_convolve, joint_convolution
from twomamba_jax.ops.norm import divide_by_rms, norm_with_residual
from twomamba_jax.ops.softmax_rows import softmax_rows
from twomamba_jax.ops.swiglu import can_gate, gated_product

KERNELS = Elementwise("mosaic_gpu")
U, FINE = 2.0**-8, 2.0**-18  # a rounding to bfloat16; a sum in float32 of numbers that err by 2^-22


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each has several pieces of work."""
    for module in (norm, convolution, softmax):
        monkeypatch.setattr(module, "programs_at_once", lambda: 2)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def gradients(function, arrays, cotangents):
    """The gradients of <cotangents, function(arrays)>."""

    @jax.jit
    def pulled(arrays, cotangents):
        y, pull = jax.vjp(function, *arrays)
        return pull(jax.tree.map(lambda y, dy: dy.astype(y.dtype), y, cotangents))

    return pulled(arrays, cotangents)


def assert_close(got, want, roundings=1):
    """Of `roundings` to bfloat16 where the result is one, none where it is float32."""
    for a, b in zip(got, want, strict=True):
        rounded = roundings * U if a.dtype == jnp.bfloat16 else 0
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.all(np.abs(a - b) <= rounded * np.abs(b) + FINE * np.abs(b).max())


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


NORMS = [(5, 1024), (1, 512), (4, 1536), (3, 2048)]


def check_norm(tokens, width):
    arrays = normal(0, 1, tokens, width), normal(1, width, dtype=jnp.float32)
    cotangents = tuple(normal(2 + n, 1, tokens, width) for n in range(4))

    def plain(x, scale):
        return x, *[scale * divide_by_rms(x, 1, 1e-2)] * 3

    want = gradients(plain, wide(arrays), wide(cotangents))
    got = gradients(lambda x, scale: norm_with_residual(x, scale, 1e-2, 3, KERNELS), arrays, cotangents)
    assert_close(got, want)
    # Without the residual connection, and with a copy that nothing uses.
    want = gradients(lambda *x: plain(*x)[1:3], wide(arrays), wide(cotangents[:2]))
    got = gradients(lambda x, scale: norm_with_residual(x, scale, 1e-2, 3, KERNELS)[1:3], arrays, cotangents[:2])
    assert_close(got, want)
    # The residual connection alone, which is the identity.
    got = gradients(lambda x, scale: norm_with_residual(x, scale, 1e-2, 3, KERNELS)[0], arrays, cotangents[0])
    assert np.array_equal(got[0], cotangents[0])
    assert not np.asarray(got[1]).any()


@pytest.mark.parametrize("sizes", NORMS if EXHAUSTIVE else NORMS[2:3], ids=str)
def test_norm(sizes):
    """One piece of the channels and several; a token for each program and more."""
    with interpreted():
        check_norm(*sizes)


@on_hopper
@pytest.mark.parametrize("sizes", [*NORMS, (2049, 1024)], ids=str)
def test_norm_on_a_gpu(sizes):
    check_norm(*sizes)


def check_gated(tokens, hidden):
    arrays = 3 * normal(0, 1, tokens, 2, hidden), normal(1, hidden, 8)
    dy = normal(2, 1, tokens, 8)

    def plain(gate_up, kernel):
        return jnp.tensordot(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], kernel, 1)

    with jax.default_matmul_precision("highest"):
        got = gradients(functools.partial(gated_product, elementwise=KERNELS), arrays, dy)
        want = gradients(plain, wide(arrays), wide(dy))
    # The gradient of h is rounded before the kernel, and h itself before the product.
    assert_close(got[:1], want[:1], roundings=2)
    error = np.abs(np.asarray(got[1], np.float32) - np.asarray(want[1]))
    h = np.abs(np.asarray(jax.nn.silu(wide(arrays[0])[..., 0, :]) * wide(arrays[0])[..., 1, :]))
    assert np.all(error <= U * (np.abs(want[1]) + np.einsum("btf,bte->fe", h, np.abs(wide(dy)))))


@pytest.mark.parametrize("sizes", [(2, 1536), (3, 1024)][: 2 if EXHAUSTIVE else 1], ids=str)
def test_gated_product(sizes):
    with interpreted():
        check_gated(*sizes)


@on_hopper
@pytest.mark.parametrize("sizes", [(3, 1024), (2, 1536), (2049, 2048)], ids=str)
def test_gated_product_on_a_gpu(sizes):
    check_gated(*sizes)


def test_a_saturated_gate_is_finite():
    """exp(-gate) leaves float32's range."""
    gate_up = jnp.stack([jnp.full((1, 1, 512), x, jnp.bfloat16) for x in (-200, 1)], 2)
    with interpreted():
        dgate_up, dkernel = gradients(
            functools.partial(gated_product, elementwise=KERNELS), (gate_up, normal(1, 512, 8)), normal(2, 1, 1, 8)
        )
    assert not np.asarray(dgate_up, np.float32).any()
    assert not np.asarray(dkernel, np.float32).any()


# (T, taps, whether documents are packed): within a block of tokens, at its edge and one after it.
CONVOLUTIONS = [(17, 2, True), (5, 4, True), (16, 2, False), (1, 3, False), (35, 4, True)]


def check_convolution(tokens, width, packed, heads=8):
    shape = 3, heads, 64
    arrays = normal(0, 2, tokens, *shape), normal(1, width, *shape, dtype=jnp.float32)
    arrays += (normal(2, *shape, dtype=jnp.float32),)
    dy = tuple(normal(3 + n, 2, tokens, *shape[1:]) for n in range(3))
    # A document that begins with a block, one of a token, an id that recurs.
    starts = np.asarray([[3, 4, 16], [1, 7, 15]])
    ids = (np.arange(tokens) >= starts[..., None]).sum(1) % 2 if packed else None
    ids = None if ids is None else jnp.asarray(ids)

    def plain(x, kernel, bias):
        return tuple(causal_convolution(x[:, :, n], kernel[:, n], bias[n], segment_ids=ids)[0] for n in range(3))

    got = gradients(lambda *arrays: joint_convolution(*arrays, ids, KERNELS), arrays, dy)
    rounded = arrays[1].astype(jnp.bfloat16).astype(jnp.float32)  # the kernel is used in the dtype of x
    want = gradients(plain, (wide(arrays[0]), rounded, arrays[2]), wide(dy))
    assert_close(got[1:], want[1:])
    scale = np.abs(want[0]).max()
    assert np.all(np.abs(wide(got[0]) - want[0]) <= 2 * U * np.abs(want[0]) + FINE * scale)
    same = jax.jit(lambda *arrays: (joint_convolution(*arrays, ids, KERNELS), plain(*arrays)))(*arrays)
    assert all(np.array_equal(a, b) for a, b in zip(*same))


@pytest.mark.parametrize("case", CONVOLUTIONS if EXHAUSTIVE else CONVOLUTIONS[:1], ids=str)
def test_convolution(case):
    with interpreted():
        check_convolution(*case)


@on_hopper
@pytest.mark.parametrize("case", [*CONVOLUTIONS, (513, 2, True, 16), (50, 2, True, 24)], ids=str)
def test_convolution_on_a_gpu(case):
    check_convolution(*case)


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


def test_traces_in_float64_mode(monkeypatch):
    """The kernels count in 32 bits there too."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    x, ids = jax.ShapeDtypeStruct((1, 7, 512), jnp.bfloat16), jax.ShapeDtypeStruct((1, 7), jnp.int32)
    params = jax.eval_shape(params_of, x)
    with jax.enable_x64(True):
        got = jax.eval_shape(jax.grad(loss_of(block_of("mosaic_gpu"))), params, x, ids)
        arrays = jnp.ones((1, 7, 8), jnp.float32), jnp.ones((8, 512), jnp.float32), jnp.zeros((1, 7), jnp.int64)
        sums = jax.eval_shape(lambda *x: cross_entropy(*x, x[0][..., 0], elementwise=KERNELS), *arrays)
    assert got == params
    assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}


def test_what_no_kernel_computes():
    """It is XLA's, and so is everything without a GPU."""
    x = jax.ShapeDtypeStruct((2, 8, 3, 8, 64), jnp.bfloat16)
    taps = jax.ShapeDtypeStruct((2, 3, 8, 64), jnp.float32)

    def resized(x, *shape, dtype=None):
        return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype)

    assert not can_convolve(x, taps, KERNELS)
    with interpreted():
        assert can_convolve(x, taps, KERNELS)
        assert not can_convolve(x, taps, Elementwise("xla"))
        assert not can_convolve(x, taps, Elementwise("triton"))
        assert not can_convolve(resized(x, dtype=jnp.float32), taps, KERNELS)
        assert not can_convolve(x, resized(taps, 5, 3, 8, 64), KERNELS)
        assert not can_convolve(x, resized(taps, 1, 3, 8, 64), KERNELS)
        assert not can_convolve(resized(x, 2, 8, 3, 4, 64), taps, KERNELS)
        assert not can_gate(jax.ShapeDtypeStruct((2, 8, 2, 640), jnp.bfloat16), KERNELS)
        assert norm_with_residual(normal(0, 1, 2, 640), normal(1, 640), 1e-5, 1, KERNELS) is None
        assert KERNELS.kernels("loss", (jax.ShapeDtypeStruct((2, 512), jnp.float32), PartitionSpec())) is softmax
        assert KERNELS.kernels("loss", (jax.ShapeDtypeStruct((2, 512), jnp.bfloat16), PartitionSpec())) is None
        assert norm_with_residual(normal(0, 1, 2, 512, dtype=jnp.float32), normal(1, 512), 1e-5, 1, KERNELS) is None


def block_of(implementation, dtype=jnp.bfloat16, elementwise_kernels=True):
    execution = {"implementation": implementation, "elementwise_kernels": elementwise_kernels}
    config = config_of("2mamba", num_heads=4, num_kv_heads=4, head_dim=128, d_model=512, mlp_dim=512)
    return Block(config=config, mixer=config.mixers[0], execution=Execution(dtype=dtype, **execution))


def loss_of(block):
    def loss(params, x, segment_ids):
        y, _ = block.apply({"params": params}, x, None, None, None, segment_ids, None, None)
        return (y.astype(jnp.float32) ** 2).sum()

    return loss


def params_of(x):
    """Those of a block, as they are at first."""
    init = block_of("xla").init(jax.random.key(0), x, None, None, None, None, None, None)
    return nn.unbox(init)["params"]


def as_on_a_gpu(monkeypatch):
    """Programs are traced with kernels; attention is XLA's."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    monkeypatch.setattr(dispatch, "choose", lambda *_: ("parallel", "xla"))


def traced(monkeypatch, function, mesh=None):
    """The elementwise kernels of a program, each with the shape of its first operand."""
    as_on_a_gpu(monkeypatch)
    x, ids = jax.ShapeDtypeStruct((4, 128, 512), jnp.bfloat16), jax.ShapeDtypeStruct((4, 128), jnp.int32)
    params = jax.eval_shape(params_of, x)
    with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext(), nn.logical_axis_rules(RULES):
        return sorted(kernels(r"(norm|convolution|swiglu)_backward", function, params, x, ids))


def test_a_block_takes_them_in_its_backward_pass(monkeypatch):
    """Of its two norms, its convolutions and its MLP, where asked; the forward pass alone has none."""
    loss = loss_of(block_of("mosaic_gpu"))
    assert traced(monkeypatch, loss) == []
    assert traced(monkeypatch, jax.grad(loss_of(block_of("mosaic_gpu", elementwise_kernels=False)))) == []
    assert traced(monkeypatch, jax.grad(loss)) == [
        ("convolution_backward", (4, 128, 3, 512)),
        ("norm_backward", (512,)),
        ("norm_backward", (512,)),
        ("swiglu_backward", (512, 2, 512)),
    ]


def test_the_result_of_the_mixers_norm_is_kept(monkeypatch):
    """By a rematerialised block, that of the other norm is not: there is memory for one."""
    as_on_a_gpu(monkeypatch)
    x, ids = jax.ShapeDtypeStruct((2, 96, 512), jnp.bfloat16), jax.ShapeDtypeStruct((2, 96), jnp.int32)
    loss = jax.checkpoint(loss_of(block_of("mosaic_gpu")), policy=DEAR)
    found = kept(x.shape, loss, jax.eval_shape(params_of, x), x, ids)
    assert found[0] == "from the argument x"
    assert found[1].startswith("named 'small'")
    assert [line for line in found if "norm_with_residual" in line] == [found[1]]


def test_each_device_computes_its_part(monkeypatch):
    """Where its part has too few channels, XLA does."""

    def found(data, tensor):
        mesh = AbstractMesh((data, 1, tensor, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
        return traced(monkeypatch, jax.grad(loss_of(block_of("mosaic_gpu"))), mesh)

    assert found(2, 1) == [
        ("convolution_backward", (2, 128, 3, 512)),
        ("norm_backward", (512,)),
        ("norm_backward", (512,)),
        ("swiglu_backward", (256, 2, 512)),
    ]
    assert found(1, 2) == [("norm_backward", (512,))] * 2


@exhaustive("the kernels by themselves, and which of them a block has, above")
def test_the_gradients_of_a_block_are_those_of_xla(monkeypatch):
    """As close to those in float32 as XLA's in bfloat16 are, in the norm of each; documents are packed.

    Attention is XLA's in all, since its own kernels round in other places. The two round in other places as well: of a
    gradient that is a difference, as the decays' is, one may err by up to twice as much as the other.
    """
    monkeypatch.setattr(dispatch, "choose", lambda *_: ("parallel", "xla"))
    x, ids = normal(1, 1, 7, 512), jnp.asarray([[0] * 3 + [1] * 4])
    params = jax.jit(params_of)(x)

    def gradient(x, *execution):
        return jax.jit(jax.grad(loss_of(block_of(*execution)), argnums=(0, 1)))(params, x, ids)

    exact, xla = gradient(wide(x), "xla", jnp.float32), gradient(x, "xla")
    with interpreted():
        ours = gradient(x, "mosaic_gpu")
    assert jax.tree.structure(ours) == jax.tree.structure(xla)
    errors, errors_of_xla = (jax.tree.map(relative_error, tree, exact) for tree in (ours, xla))
    for (path, error), of_xla in zip(jax.tree.leaves_with_path(errors), jax.tree.leaves(errors_of_xla), strict=True):
        assert error < 2 * of_xla, path


def relative_error(a, b):
    a, b = wide((a, b))
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
