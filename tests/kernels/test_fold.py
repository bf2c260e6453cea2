"""The kernel that folds waiting tokens into states, under the interpreter, and through the cache that uses it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.fold_cases import CASES, check, normal, problem
from support.hopper import on_hopper
from support.models import config_of

from pallas_kernels.decoding import fold as kernel
from pallas_kernels.interpreter import interpreted
from twomamba_jax import Execution, LanguageModel, Mixer, init_cache
from twomamba_jax.layers.cache import init_mixer_cache
from twomamba_jax.ops import dispatch
from twomamba_jax.ops.decoding import cached_attention as ops
from twomamba_jax.ops.state import FiniteState


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs or three in all, each with tiles of several states and several tiles of one."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 1)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("score", "size", "dtype", "of_tokens", "due", "previous"), CASES if EXHAUSTIVE else CASES[1:4:2], ids=str
)
def test_equals_the_formula(score, size, dtype, of_tokens, due, previous):
    due = np.array(due)
    layers, groups = (1, 1) if score == "squared" else (2, 2)
    options = {"layers": layers, "groups": groups, "dtype": dtype, "of_tokens": of_tokens, "previous": previous}
    arguments = problem(score, size, due, **options)
    with interpreted():
        got = jax.jit(functools.partial(kernel.fold, score))(*arguments, due)
    check(score, arguments, due, got)


def test_as_many_programs_as_on_a_gpu():
    """Each with one tile: fewer than there could be."""
    due = np.array([False, True])
    arguments = problem("squared", 3, due, layers=1)
    with interpreted():
        check("squared", arguments, due, jax.jit(functools.partial(kernel.fold, "squared"))(*arguments, due))


@pytest.mark.usefixtures("few_programs")
def test_rows_that_are_not_due_may_hold_anything():
    """NaN in a row's state, tokens and decays stays there, and nothing of it reaches another row."""
    due = np.array([True, False, True])
    arguments = problem("linear", 4, due, previous=True)
    state, previous, keys, values, start, *weights = arguments

    def poisoned(x):
        x = np.array(x)
        x[:, 1] = np.nan
        return jnp.asarray(x)

    poison = jax.tree.map(poisoned, (state, previous, keys, values)), start, jax.tree.map(poisoned, weights)
    poison = (*poison[0], start, *poison[2])
    fold = jax.jit(functools.partial(kernel.fold, "linear"))
    with interpreted():
        clean, dirty = (fold(*x, due) for x in (arguments, poison))
    for want, got, before in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), jax.tree.leaves(poison)):
        np.testing.assert_array_equal(got[:, due], want[:, due])
        np.testing.assert_array_equal(got[:, 1], before[:, 1])


def folding_by(implementation, partition=None):
    """Jitted: the outputs of some tokens, by XLA, and the cache behind them, which `implementation` folds."""

    @jax.jit
    def call(cache, tokens, lengths):
        common = {"score": "linear", "precision": "highest"}
        y, new = ops.read(*tokens, cache, normalize=True, lengths=lengths, implementation="xla", **common)
        return y, ops.write(cache, new, implementation=implementation, partition=partition, **common)

    return call


def tokens_of(seed, cache):
    """As many as fold at a time, for each row."""
    shape = *cache.length.shape, cache.fold_size, 1
    decay = -np.abs(np.random.default_rng(10 * seed + 3).standard_normal(shape, np.float32)) / 4
    return *(normal(10 * seed + n, *shape, 64) for n in range(3)), decay


def decode(call, cache, counts):
    """The cache after calls of up to r tokens, of which `counts` [calls][B] count in each row; and their outputs."""
    outputs = []
    for seed, lengths in enumerate(counts):
        y, cache = call(cache, tokens_of(seed, cache), np.array(lengths))
        outputs.append(y)
    return cache, outputs


def empty_cache(rows, *, fold_size=2, **options):
    return ops.init_decoding_cache("linear", rows, 1, 64, 64, fold_size=fold_size, **options)


COUNTS = [(2, 1, 0), (1, 2, 1), (2, 2, 1), (1, 0, 2), (2, 2, 1)]  # 4, 3 and 2 folds


@pytest.fixture
def mesh():
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        yield


@functools.cache
def folding_on_mesh():
    """By the kernel: a program that two tests share."""
    return folding_by("mosaic_gpu", PartitionSpec("data", None, "tensor"))


def assert_folds_as_xla(call, rollback):
    want, outputs = decode(folding_by("xla"), empty_cache(3, rollback=rollback), COUNTS)
    np.testing.assert_array_equal(want.folded, [8, 6, 4])
    with interpreted():
        got, others = decode(call, empty_cache(3, rollback=rollback), COUNTS)
    for x, y in zip(jax.tree.leaves((got, others)), jax.tree.leaves((want, outputs)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("few_programs", "mesh")
def test_a_cache_that_the_kernel_folds_is_the_one_that_xla_folds():
    assert_folds_as_xla(folding_on_mesh(), rollback=True)


@pytest.mark.usefixtures("few_programs")
@exhaustive("the test above, of a cache that can be rolled back, on a mesh of one device")
def test_a_cache_folds_without_a_mesh_too():
    assert_folds_as_xla(folding_by("mosaic_gpu"), rollback=False)


@pytest.mark.usefixtures("few_programs", "mesh")
def test_rolls_back_to_the_bit():
    """Over a fold, in two rows of three; what follows then has the bits that it had."""
    start, last, call = COUNTS[:3], COUNTS[3:], folding_on_mesh()
    with interpreted():
        cache, _ = decode(call, empty_cache(3, rollback=True), start)
        want = decode(call, cache, last)
        ahead, _ = decode(call, cache, [(1, 2, 1)])
        np.testing.assert_array_equal(ahead.folded - cache.folded, [2, 2, 0])
        back = jax.jit(ops.roll_back)(ahead, np.array([1, 2, 1]))
        for x, y in zip(jax.tree.leaves(back.state), jax.tree.leaves(cache.state), strict=True):
            np.testing.assert_array_equal(x, y)
        got = decode(call, back, last)
    np.testing.assert_array_equal(got[0].length, want[0].length)
    for x, y in zip(jax.tree.leaves((got[0].state, got[1])), jax.tree.leaves((want[0].state, want[1])), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("implementation", "folds"), [("mosaic_gpu", 1), ("xla", 0)])
def test_a_mixer_folds_by_its_implementation(implementation, folds, monkeypatch):
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    config = config_of("mamba2", num_heads=1, num_kv_heads=1, head_dim=64)
    mixer = Mixer(config.mixers[0], num_heads=1, head_dim=64, execution=Execution(implementation=implementation))
    x = normal(0, 2, 1, config.d_model)

    def call(x):
        cache = init_mixer_cache(config.mixers[0], config, 2, 4, fold_size=1)
        return mixer.init_with_output(jax.random.key(0), x, cache=cache)[0]

    assert len(re.findall(r"name=fold\b", str(jax.make_jaxpr(call)(x)))) == folds


XLA = exhaustive("test_a_mixer_folds_by_its_implementation, in which XLA calls no kernel")


@pytest.mark.parametrize(("implementation", "aliases"), [("mosaic_gpu", 2), pytest.param("xla", 0, marks=XLA)])
def test_a_model_folds_all_layers_at_once(implementation, aliases, monkeypatch):
    """One kernel that works in place, on a kv and a key_sum: three layers, lowered without a GPU."""
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    config = config_of("2mamba", 3, num_heads=1, num_kv_heads=1, head_dim=64)
    model, tokens = LanguageModel(config, Execution(implementation=implementation)), jnp.ones((2, 1), jnp.int32)

    def step(cache):
        params = LanguageModel(config).init(jax.random.key(0), tokens)["params"]
        return model.apply({"params": params}, tokens, cache=cache)

    cache = jax.eval_shape(lambda: init_cache(config, 2, 4))
    text = jax.jit(step).trace(cache).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("#stablehlo.output_operand_alias<") == aliases


def test_folds_by_xla_what_the_kernel_cannot(monkeypatch):
    def reason(size=4, keys=jnp.float32, values=jnp.float32, states=jnp.float32, width=64):
        shapes = ((1, 64, 64), states), ((1, 8, width), keys), ((1, 8, 64), values)
        return kernel.unsupported(*(jax.ShapeDtypeStruct(*shape) for shape in shapes), size)

    assert reason() is None
    assert reason(width=32) == "it folds keys and values of 64 numbers, and these have 32 and 64"
    assert reason(states=jnp.float16) == "it folds states in float32 or bfloat16, and these are float16"
    assert reason(keys=jnp.float16) == "it folds keys in float32 or bfloat16, and these are float16"
    assert reason(values=jnp.float16) == "it folds values in float32 or bfloat16, and these are float16"
    assert reason(size=129) == "it has shared memory for 128 tokens at a time, and these are 129"

    monkeypatch.setattr(kernel, "fold", None)

    def shapes_of(cache):
        return jax.eval_shape(folding_by("mosaic_gpu"), cache, tokens_of(0, cache), np.ones(3, np.int32))

    short, long = empty_cache(3), empty_cache(3, fold_size=129)
    with interpreted():
        shapes_of(long)
        with pytest.raises(TypeError, match="not callable"):
            shapes_of(short)
    shapes_of(short)  # no kernel: it needs a GPU


@on_hopper
@pytest.mark.parametrize("previous", [False, True], ids=["", "previous"])
@pytest.mark.parametrize(("dtype", "of_tokens"), [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)], ids=str)
@pytest.mark.parametrize(("score", "size"), [("squared", 16), ("squared", 100), ("linear", 5)])
def test_on_a_gpu(score, size, dtype, of_tokens, previous):
    """Donated, as in a loop; where every state has neighbours on both sides."""
    due = np.array([True, False, True, True, False])
    options = {"layers": 3, "groups": 3, "dtype": dtype, "of_tokens": of_tokens, "previous": previous}
    arguments = problem(score, size, due, **options)
    kept = jax.tree.map(np.asarray, arguments)
    got = jax.jit(functools.partial(kernel.fold, score), donate_argnums=(0, 1))(*arguments, due)
    check(score, kept, due, got)


@on_hopper
def test_in_a_loop_over_slices_on_a_gpu():
    """States that are read from one stack and written to another, rows that are not due included."""
    due = np.array([True, False, True])
    state, _, *rings, start, log_weights, log_carry = arguments = problem("squared", 4, due, layers=4)

    def step(_, layer):
        state, *tokens = jax.tree.map(lambda x: x[None], layer)
        keys, values, weights, carry = tokens
        state, _ = kernel.fold("squared", state, None, keys, values, start, weights, carry, due)
        return None, jax.tree.map(lambda x: x[0], state)

    _, got = jax.jit(lambda *layers: jax.lax.scan(step, None, layers))(state, *rings, log_weights, log_carry)
    check("squared", arguments, due, (got, None))


@on_hopper
def test_a_stack_past_32_bits():
    """2.3e9 numbers, of which two rows of the last layer's are looked at: one that is due and one that is not."""
    due = np.arange(64) == 62
    heads = 17, 64, 16

    def ring(seed):
        return normal(seed, *heads, 8, 64, dtype=jnp.bfloat16)

    state = FiniteState(jnp.ones((*heads, 2080, 64), jnp.bfloat16), jnp.ones((*heads, 2080)))
    tokens = ring(0), ring(1), jnp.full((64,), 4, jnp.int32), jnp.zeros((*heads, 4)), jnp.zeros(heads)
    new, _ = jax.jit(functools.partial(kernel.fold, "squared"), donate_argnums=0)(state, None, *tokens, due)
    last = jax.tree.map(lambda x: x[-1:, 62:], (new, *tokens[:2], *tokens[3:]))
    ones = FiniteState(jnp.ones((1, 2, 16, 2080, 64), jnp.bfloat16), jnp.ones((1, 2, 16, 2080)))
    arguments = ones, None, *last[1:3], tokens[2][62:], *last[3:]
    check("squared", arguments, due[62:], (last[0], None))
