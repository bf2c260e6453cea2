"""The kernel of one token's attention to a cache: interpreted, on a GPU, and through the operation that uses it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE
from support.hopper import on_hopper, on_two_devices
from support.models import config_of
from support.step_cases import CASES, check, normal

from pallas_kernels.decoding import step as kernel
from pallas_kernels.interpreter import interpreted
from twomamba_jax import Execution, LanguageModel, init_cache
from twomamba_jax.ops.decoding.cached_attention import init_decoding_cache, read, roll_back, write
from twomamba_jax.ops.state import FiniteState

# Each score, dtype and state dtype, with and without normalisation; the number of tiles: none, one, two. Float32 is the
# steps' further below.
FEW = [CASES[1], CASES[4], CASES[3]]


@pytest.mark.parametrize("case", CASES if EXHAUSTIVE else FEW, ids=str)
def test_equals_the_definition(case):
    with interpreted():
        check(kernel.decode_step, *case)


@on_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition_on_a_gpu(case):
    check(kernel.decode_step, *case)


def caches(dtype, layers=2):
    """A stack of the caches of two layers, and the last of them alone."""
    cache = init_decoding_cache("squared", 2, 1, 64, 64, fold_size=2, dtype=dtype, rollback=True)
    state = FiniteState(normal(2, *cache.state.kv.shape), abs(normal(3, *cache.state.key_sum.shape)))
    alone = cache._replace(state=state)
    return jax.tree.map(lambda x: jnp.asarray(np.stack([np.zeros_like(x)] * (layers - 1) + [x])), alone), alone


def token(dtype, seed=4):
    arrays = (normal(seed + n, 2, 1, heads, 64, dtype=dtype) for n, heads in enumerate((2, 1, 1)))
    return *arrays, -np.abs(normal(seed + 3, 2, 1, 1))


attend = functools.partial(read, score="squared", normalize=True)


@pytest.mark.parametrize(("implementation", "names"), [(None, ["decode_step", "fold"]), ("xla", [])])
def test_kernels_attend_and_fold_unless_xla_is_named(implementation, names):
    stack, alone = caches(jnp.float32)

    def step(arrays, stack):
        y, new = attend(*arrays, stack, layer=jnp.int32(1), implementation=implementation)
        return y, write(alone, new, score="squared", implementation=implementation)

    with interpreted():
        program = str(jax.make_jaxpr(step)(token(jnp.float32), stack))
    assert [name for name in ("decode_step", "fold") if f"name={name}\n" in program] == names


@functools.cache
def stepper(score, normalize, implementation):
    """Jitted: one token in the rows that are active, and the cache after it."""

    @jax.jit
    def step(cache, token, active):
        options = {"score": score, "precision": "highest"}
        y, new = read(*token, cache, normalize=normalize, lengths=active, implementation=implementation, **options)
        return y, write(cache, new, implementation=implementation, **options)

    return step


@pytest.mark.parametrize(("score", "normalize"), [("squared", True), ("linear", False)][: None if EXHAUSTIVE else 1])
def test_steps_with_the_kernels_are_the_steps_without(score, normalize):
    """From an empty cache over several folds, which a kernel does too, in rows that are not at the same token."""
    cache = ours = init_decoding_cache(score, 2, 1, 64, 64, fold_size=2, rollback=True)
    xla = stepper(score, normalize, "xla")
    with interpreted():
        step = stepper(score, normalize, "mosaic_gpu")
        for index in range(4):
            active = np.array([1, index != 1], np.int32)
            new = token(jnp.float32, 10 * index)
            got, ours = step(ours, new, active)
            want, cache = xla(cache, new, active)
            scale = np.abs(want).max()
            np.testing.assert_allclose(got, want, atol=64 * np.finfo(np.float32).eps * scale)
    assert cache.folded.tolist() == ours.folded.tolist() == [4, 2]
    for x, y in zip(jax.tree.leaves(ours.state), jax.tree.leaves(cache.state)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_step_with_the_kernel_is_the_step_without():
    """With the cache in a stack, under a mesh; alone and without a mesh it is above."""
    stack, alone = caches(jnp.float32)
    new = token(jnp.float32)
    want, _ = stepper("squared", True, "xla")(alone, new, np.ones(2, np.int32))
    options = {
        "layer": jnp.int32(1),
        "implementation": "mosaic_gpu",
        "partition": PartitionSpec("data", None, "tensor"),
    }
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with interpreted(), jax.set_mesh(mesh):
        got = jax.jit(lambda cache, *new: attend(*new, cache, **options)[0])(stack, *new)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_step_after_a_roll_back_has_the_bits_of_the_step_without():
    """A token is read and taken back: over a fold in one row, not in the other."""
    step = stepper("squared", True, "mosaic_gpu")
    active = np.ones(2, np.int32)
    cache = init_decoding_cache("squared", 2, 1, 64, 64, fold_size=2, rollback=True)
    skip = stepper("squared", True, "xla")
    for index in range(3):
        _, cache = skip(cache, token(jnp.float32, 10 * index), np.array([1, index > 0], np.int32))
    _, ahead = skip(cache, token(jnp.float32, 100), active)
    back = jax.jit(roll_back)(ahead, active)
    assert (ahead.folded - cache.folded).tolist() == [2, 0]
    with interpreted():
        want, _ = step(cache, token(jnp.float32, 50), active)
        got, _ = step(back, token(jnp.float32, 50), active)
    np.testing.assert_array_equal(got, want)
    assert np.abs(want).min() > 0


def test_refuses_with_the_reason():
    _, cache = caches(jnp.float32)
    q, k, v, log_decay = token(jnp.float32)

    def refusal(*arrays, cache=cache):
        with interpreted(), pytest.raises(ValueError, match="implementation='mosaic_gpu' cannot compute") as error:
            jax.eval_shape(functools.partial(attend, implementation="mosaic_gpu"), *arrays, cache)
        return str(error.value)

    two = (np.repeat(x, 2, axis=1) for x in (q, k, v, log_decay))
    assert "one token at a time, and these are 2" in refusal(*two)
    assert "4 query heads per key/value head, and these are 6" in refusal(np.repeat(q, 3, axis=2), k, v, log_decay)
    half = cache._replace(state=cache.state._replace(kv=np.asarray(cache.state.kv).astype(np.float16)))
    assert "float32 or bfloat16, and these are float16" in refusal(q, k, v, log_decay, cache=half)
    assert kernel.unsupported(q, np.zeros((2080, 32)), 1) == "it has keys and values of 64, and these are of 64 and 32"
    double = jax.ShapeDtypeStruct(q.shape, jnp.float64)
    assert kernel.unsupported(double, cache.state.kv, 1) == "it computes in float32, and the queries are float64"
    with pytest.raises(ValueError, match="it needs a Hopper GPU"):
        attend(q, k, v, log_decay, cache, implementation="mosaic_gpu")
    new = jax.eval_shape(attend, q, k, v, log_decay, cache)[1]
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        jax.eval_shape(functools.partial(write, score="squared", implementation="cuda"), cache, new)


@on_hopper
def test_a_model_on_a_gpu_decodes_as_by_xla():
    """Both kernels in the loops over layers and tokens, over folds, in rows that are not at the same token."""
    config = config_of("2mamba", 3, num_heads=2, num_kv_heads=1, head_dim=64)
    tokens = jax.random.randint(jax.random.key(1), (40, 3), 0, config.vocab_size)
    active = jnp.arange(40)[:, None] >= jnp.array([0, 3, 9])
    params = LanguageModel(config).init(jax.random.key(0), tokens[:1].T)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def logits(implementation, cache):
        model = LanguageModel(config, Execution(implementation=implementation, precision="highest"))

        def step(cache, new):
            token, active = new
            logits, cache = model.apply({"params": params}, token[:, None], cache=cache, lengths=active)
            return cache, jnp.where(active[:, None], logits[:, 0], 0)

        return jax.lax.scan(step, cache, (tokens, active.astype(jnp.int32)))

    cache = init_cache(config, 3, 40, fold_size=4)
    (ours, got), (theirs, want) = (logits(implementation, cache) for implementation in ("mosaic_gpu", "xla"))
    np.testing.assert_allclose(got, want, atol=1e-3 * float(jnp.abs(want).max()))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(x, y, atol=1e-3 * float(jnp.abs(y).max()))


@on_hopper
@on_two_devices
@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_steps_sharded_over_two_devices(axis):
    """Attending and folding, over three folds in one row and two in the other."""
    partition = PartitionSpec(*("data" if axis == name else None for name in ("batch", "tokens", "heads")))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    tokens = [[normal(10 * n + m, 2, 1, 2, 64) for m in range(3)] for n in range(6)]

    @functools.partial(jax.jit, static_argnums=0)
    def step(partition, cache, new, active):
        y, new = attend(*new, None, cache, lengths=active, partition=partition)
        return y, write(cache, new, score="squared", partition=partition)

    def decode(partition):
        cache, outputs = init_decoding_cache("squared", 2, 2, 64, 64, fold_size=2), []
        for n, new in enumerate(tokens):
            y, cache = step(partition, cache, new, jnp.array([1, n % 3 > 0], jnp.int32))
            outputs.append(y)
        return outputs, cache

    want = decode(None)
    with jax.set_mesh(mesh):
        got = decode(partition)
    assert got[1].folded.tolist() == [6, 4]
    assert not got[1].state.kv.sharding.is_fully_replicated
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()))


def shapes_of(layers, batch, groups, repeats, slots=32):
    """The arguments of a squared step in bfloat16, with float32 states."""
    heads, stack = (batch, groups), (layers, batch, groups)
    ring = (*stack, slots, 64), jnp.bfloat16
    position = (layers, batch), jnp.int32
    shapes = (
        ((), jnp.int32), ((*stack, 2080, 64), jnp.float32), ((*stack, 2080), jnp.float32), ring, ring,
        position, position,
        ((*heads, repeats, 64), jnp.bfloat16), ((*heads, 64), jnp.bfloat16), ((*heads, 64), jnp.bfloat16),
        ((*heads, kernel.padded(slots)), jnp.float32),
    )  # fmt: skip
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


step = functools.partial(kernel.decode_step, kernel.DecodeStep("squared", True, 1 / 8))


@on_hopper
def test_a_stack_past_32_bits():
    """2.3e9 numbers, of which the last layer is read: what it gives is what that layer gives as a stack of one."""
    layers = 17
    one = [
        jnp.zeros(x.shape, x.dtype) if x.dtype == jnp.int32 else normal(n, *x.shape, dtype=x.dtype)
        for n, x in enumerate(shapes_of(1, 64, 16, 1))
    ]
    one[1] = one[1].astype(jnp.bfloat16)
    want = jax.jit(step)(*one)
    in_stack = jax.jit(lambda last: jnp.zeros((layers, *last.shape[1:]), last.dtype).at[-1].set(last[0]))
    got = jax.jit(step)(jnp.int32(layers - 1), *map(in_stack, one[1:7]), *one[7:])
    assert np.abs(want).max() > 0
    np.testing.assert_array_equal(got, want)
