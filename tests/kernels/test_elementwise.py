"""The kernels of backward passes between products, against autodiff of the same in float32."""

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

from pallas_kernels.elementwise import convolution, norm
from pallas_kernels.interpreter import interpreted
from train.sharding import MESH_AXES, RULES
from twomamba_jax import Execution
from twomamba_jax.layers import Block
from twomamba_jax.layers.execution import DEAR
from twomamba_jax.ops import dispatch
from twomamba_jax.ops.convolution import causal_convolution
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.joint_convolution import can_convolve, joint_convolution
from twomamba_jax.ops.norm import divide_by_rms, norm_with_residual
from twomamba_jax.ops.swiglu import can_gate, gated_product

KERNELS = Elementwise("mosaic_gpu")
U, FINE = 2.0**-8, 2.0**-18  # a rounding to bfloat16; a sum in float32 of numbers that err by 2^-22


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each has several pieces of work."""
    for module in (norm, convolution):
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


def test_traces_in_float64_mode(monkeypatch):
    """The kernels count in 32 bits there too."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    x, ids = jax.ShapeDtypeStruct((1, 7, 512), jnp.bfloat16), jax.ShapeDtypeStruct((1, 7), jnp.int32)
    params = jax.eval_shape(params_of, x)
    with jax.enable_x64(True):
        got = jax.eval_shape(jax.grad(loss_of(block_of("mosaic_gpu"))), params, x, ids)
    assert got == params


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
        assert norm_with_residual(normal(0, 1, 2, 512, dtype=jnp.float32), normal(1, 512), 1e-5, 1, KERNELS) is None


def test_convolves_sharded_tokens_that_a_window_fits_in():
    """Four taps look back over three tokens, as many as each of four devices must have."""
    kernels = Elementwise("mosaic_gpu", PartitionSpec("data", "sequence"))
    taps = jax.ShapeDtypeStruct((4, 3, 8, 64), jnp.float32)
    mesh = AbstractMesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)

    def x(rows, tokens):
        return jax.ShapeDtypeStruct((rows, tokens, 3, 8, 64), jnp.bfloat16)

    with interpreted(), jax.sharding.use_abstract_mesh(mesh):
        assert not can_convolve(x(2, 8), taps, kernels)
        assert can_convolve(x(2, 12), taps, kernels)
        for shape, message in (((3, 12), "3 rows of the batch"), ((2, 14), "14 tokens")):
            with pytest.raises(ValueError, match=f"^{message} cannot be sharded over the"):
                jax.eval_shape(lambda x, taps: joint_convolution(x, taps, None, None, kernels), x(*shape), taps)


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
