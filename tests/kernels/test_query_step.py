"""The kernel that reads a state for one token, under the interpreter, and through the operation that uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import on_hopper
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import query_step as kernel
from pallas_kernels.interpreter import interpreted
from twomamba_jax.ops.cached_attention import append, cached_attention, init_decoding_cache
from twomamba_jax.ops.recurrent_cache import LayerCache
from twomamba_jax.ops.state import FiniteState


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
    """A cache in a stack of two layers, and the same cache alone."""
    cache = init_decoding_cache("squared", 2, 1, 64, 64, fold_size=4, dtype=dtype)
    stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), cache)
    state = FiniteState(
        normal(2, layers, *cache.state.kv.shape), jnp.abs(normal(3, layers, *cache.state.key_sum.shape))
    )
    cache = LayerCache(stack._replace(state=state), jnp.int32(1))
    return cache, cache.take()


def token(dtype):
    arrays = (normal(4 + n, 2, 1, heads, 64, dtype=dtype) for n, heads in enumerate((2, 1, 1)))
    return *arrays, -jnp.abs(normal(7, 2, 1, 1))


attend = functools.partial(cached_attention, score="squared", normalize=True)


def test_a_step_with_the_kernel_is_the_step_without():
    """With the state alone, and in a stack under a mesh. Outputs only: a step changes no state."""
    in_stack, alone = caches(jnp.float32)
    want, _ = attend(*token(jnp.float32), alone, implementation="xla", precision="highest")
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with interpreted():
        got, new = attend(*token(jnp.float32), alone)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert new.state is None
        with jax.set_mesh(mesh):
            partition = PartitionSpec("data", None, "tensor")
            got, _ = attend(*token(jnp.float32), in_stack, partition=partition)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_none_takes_no_kernel_that_has_not_run_on_a_gpu():
    """Those that are named do it all."""

    def kernels_of(implementation):
        cache, _ = caches(jnp.float32)

        def step(arrays, cache):
            y, new = attend(*arrays, cache, implementation=implementation)
            return y, append(cache.take(), new, score="squared", implementation=implementation)

        with interpreted():
            program = str(jax.make_jaxpr(step)(token(jnp.float32), cache))
        return {name for name in ("query_step", "decode_step", "fold") if f"name={name}\n" in program}

    assert kernels_of(None) == {"query_step"}
    assert kernels_of("mosaic_gpu") == {"decode_step", "fold"}
    assert kernels_of("xla") == set()


@on_hopper
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
