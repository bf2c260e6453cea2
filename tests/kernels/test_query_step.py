"""The kernel that reads a state for one token, under the interpreter, and through the operation that uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import query_step as kernel
from pallas_kernels.device import unsupported_device
from pallas_kernels.interpreter import interpreted
from twomamba_jax.ops.cached_attention import cached_attention, init_decoding_cache
from twomamba_jax.ops.state import FiniteState, LayerState


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize(
    ("features", "repeats", "dtype"), [(2080, 1, jnp.float32), (64, 4, jnp.float32), (528, 3, jnp.bfloat16)], ids=str
)
def test_equals_the_product(features, repeats, dtype):
    """Whole tiles, one that overlaps the tile before it, and several programs per state."""
    stack, phi = normal(0, 3, 2, 1, features, 64, dtype=dtype), normal(1, 2, 1, repeats, features)
    with interpreted():
        got = kernel.query_step(stack, jnp.int32(1), phi)
    wide = np.asarray(stack[1]).astype(np.float64)
    want = np.einsum("bgrd,bgdv->bgrv", np.asarray(phi, np.float64), wide)
    size = np.einsum("bgrd,bgdv->bgrv", np.abs(phi), np.abs(wide))
    # Sums of products of float32 numbers: no more than an epsilon for each of D terms, far fewer in fact.
    assert (np.abs(got - want) <= np.sqrt(features) * np.finfo(np.float32).eps * size).all()


def caches(dtype, layers=2):
    """A cache whose state lies in a stack of two layers, and the same cache with its state alone."""
    cache = init_decoding_cache("squared", 2, 1, 64, 64, fold_size=4, dtype=dtype)
    stack = FiniteState(
        normal(2, layers, *cache.state.kv.shape), jnp.abs(normal(3, layers, *cache.state.key_sum.shape))
    )
    alone = jax.tree.map(lambda x: x[1], stack)
    return cache._replace(state=LayerState(stack, jnp.int32(1))), cache._replace(state=alone)


def token(dtype):
    arrays = (normal(4 + n, 2, 1, heads, 64, dtype=dtype) for n, heads in enumerate((2, 1, 1)))
    return *arrays, -jnp.abs(normal(7, 2, 1, 1))


attend = functools.partial(cached_attention, score="squared", normalize=True)


def test_a_step_with_the_kernel_is_the_step_without():
    """With the state in a stack and alone, on one device and under a mesh. Outputs only: a step changes no state."""
    in_stack, alone = caches(jnp.float32)
    want, _ = attend(*token(jnp.float32), alone, implementation="xla", precision="highest")
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with interpreted():
        for cache in (in_stack, alone):
            got, new = attend(*token(jnp.float32), cache, implementation="mosaic_gpu")
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
            assert new.state is None
        with jax.set_mesh(mesh):
            partition = PartitionSpec("data", None, "tensor")
            got, _ = attend(*token(jnp.float32), in_stack, implementation="mosaic_gpu", partition=partition)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_refuses_with_the_reason():
    _, cache = caches(jnp.float32)
    q, k, v, log_decay = token(jnp.float32)

    def refusal(*arrays, cache=cache):
        with interpreted(), pytest.raises(ValueError, match="implementation='mosaic_gpu' cannot compute") as error:
            attend(*arrays, cache, implementation="mosaic_gpu")
        return str(error.value)

    two = (jnp.repeat(x, 2, axis=1) for x in (q, k, v, log_decay))
    assert "one token at a time, and these are 2" in refusal(*two)
    assert "4 query heads per key/value head, and these are 6" in refusal(jnp.repeat(q, 3, axis=2), k, v, log_decay)
    half = cache._replace(state=cache.state._replace(kv=cache.state.kv.astype(jnp.float16)))
    assert "float32 or bfloat16, and these are float16" in refusal(q, k, v, log_decay, cache=half)
    assert kernel.unsupported(jnp.zeros((1, 1, 1, 128, 32)), 1) == "it reads states of 64 values, and these have 32"
    assert (
        kernel.unsupported(jnp.zeros((1, 1, 1, 36, 64)), 1)
        == "it reads states of at least 64 features, and these have 36"
    )
    with pytest.raises(ValueError, match="it needs a Hopper GPU"):
        attend(q, k, v, log_decay, cache, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.skipif(unsupported_device() is not None, reason=f"no kernel: {unsupported_device()}")
def test_a_stack_past_32_bits():
    """2.3e9 numbers, of which the last layer is read."""
    layers, shape = 17, (64, 16, 2080, 64)
    last = normal(0, *shape, dtype=jnp.bfloat16)
    stack = jax.jit(lambda last: jnp.zeros((layers, *shape), last.dtype).at[-1].set(last))(last)
    phi = normal(1, *shape[:2], 1, shape[2])
    got = jax.jit(kernel.query_step)(stack, jnp.int32(layers - 1), phi)
    want = jnp.einsum("bgrd,bgdv->bgrv", phi, last.astype(jnp.float32), precision="highest")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))


def test_lowers_for_cuda():
    """For a stack past 2^31 numbers, without a GPU."""
    shapes = (((20, 64, 16, 2080, 64), jnp.float32), ((), jnp.int32), ((64, 16, 4, 2080), jnp.float32))
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = jax.jit(kernel.query_step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "query_step" in text
    assert "custom_call @mosaic_gpu" in text
