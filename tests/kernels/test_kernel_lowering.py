"""Everything lowers for CUDA, without a GPU: every program of the tuning table, and kernels inside transformations.

Lowering generates a kernel's code and checks layouts, tile sizes and shared memory; the compilers that remain are those
of `benchmarks/compile_kernels.py`.
"""

import contextlib
import functools
import re
import signal

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE
from support.traced import kernels

from pallas_kernels.chunked.gradient import gradient
from pallas_kernels.chunked.layout import TILES
from pallas_kernels.chunked.problem import Problem
from pallas_kernels.chunked.programs import programs as chunked_programs
from pallas_kernels.chunked.squared import SQUARED
from pallas_kernels.decoding.programs import programs as decoding_programs
from pallas_kernels.elementwise.programs import programs as elementwise_programs
from pallas_kernels.quadratic.programs import programs
from twomamba_jax import decay_attention
from twomamba_jax.layers.execution import DEAR, REMATS
from twomamba_jax.ops import dispatch

FORWARD, QUERIES, KEYS = (f"squared_{kernel}" for kernel in ("forward", "backward_queries", "backward_keys"))
# In every run one of a score that has none in chunks: there the others have theirs, of either head dimension.
SOME = "NVIDIA_H200-exp-128-8192-decay-segments-normalize"
PROGRAMS = [program for program in programs() if EXHAUSTIVE or program.name == SOME]
CHUNKED = [program for program in chunked_programs() if EXHAUSTIVE or program.name == "chunked-linear-64"]

DECODING = [
    program
    for program in decoding_programs()
    if EXHAUSTIVE
    or program.name in ("decode_step-squared-float32-16-heads-4-normalize", "fold-squared-float32-16-rollback")
]
ELEMENTWISE = [
    program
    for program in elementwise_programs()
    if EXHAUSTIVE
    or program.name
    in ("norm_backward-4-2048", "convolution_backward-4-1536", "swiglu_backward-3072", "softmax_rows-32000")
]


def lower(function, *arguments) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels in the lowered program, in its order, each with the shape of its first operand."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    names = [re.search(r"\\00(\w+_(?:forward|queries|keys))_mosaic_gpu\\00", line)[1] for line in calls]
    shapes = [re.search(r": \(tensor<([\dx]+)xbf16>", line)[1] for line in calls]
    return [(name, tuple(map(int, shape.split("x")))) for name, shape in zip(names, shapes)]


def names(function, *arguments) -> list[str]:
    return [name for name, _ in lower(function, *arguments)]


# Of what is traced alone, the quadratic kernels, each with the shape of its first operand.
quadratic_kernels = functools.partial(kernels, r"\w+_(forward|queries|keys)")


def traced(function, *arguments) -> list[str]:
    """Their names."""
    return [name for name, _ in quadratic_kernels(function, *arguments)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_program_lowers(program):
    (score,) = {score for score in ("linear", "squared", "exp") if f"-{score}-" in program.name}
    want = [f"{score}_{kernel}" for kernel in ("forward", "backward_queries", "backward_keys")]
    assert names(program.function, *program.arguments) == want


LOWERING_SECONDS = 240  # ten times what it takes


@contextlib.contextmanager
def ending_after(seconds):
    """Raises TimeoutError in Python code that takes longer."""

    def end(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("program", CHUNKED, ids=lambda program: program.name)
def test_every_program_in_chunks_lowers(program):
    """In LOWERING_SECONDS too: what no layout satisfies, Mosaic searches for without end."""
    score = program.name.split("-")[1]
    text = lowered(program.function, *program.arguments)
    kernels = {"forward", "backward_queries", "backward_keys", "update", "query", "gradient"}
    kernels |= {"normalizer"} if score == "squared" and "-normalize" in program.name else set()
    assert stages(text, score) == {f"{score}_{name}" for name in kernels} | {"scan", "scan_backward"}


def stages(text: str, score: str) -> set[str]:
    """The kernels of the chunked form in a lowered program."""
    return set(re.findall(rf"\\00((?:{score}|scan)\w*)_mosaic_gpu\\00", text))


def lowered(function, *arguments) -> str:
    with ending_after(LOWERING_SECONDS):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(EXHAUSTIVE, reason="all of them above")
def test_stages_of_squared_scores_lower():
    """Those of the forward pass together, and the gradient's; with them the programs above take half a minute."""
    q, kv, decay = (jax.ShapeDtypeStruct((1, 4096, *x.shape[2:]), x.dtype) for x in (Q, KV, DECAY))
    chunked = functools.partial(decay_attention, form="chunked", implementation="mosaic_gpu")
    want = {f"squared_{name}" for name in ("forward", "update", "query", "normalizer")} | {"scan"}
    assert stages(lowered(chunked, q, kv, kv, decay), "squared") == want
    problem = Problem(1, 4096, H, G, 1024, SQUARED.tiles, False)
    state = jax.ShapeDtypeStruct((1, G, 4, TILES, K, K), jnp.bfloat16)
    text = lowered(functools.partial(gradient, problem, want_sums=True), q, q, state, q)
    assert stages(text, "squared") == {"squared_gradient"}


@pytest.mark.parametrize("program", DECODING, ids=lambda program: program.name)
def test_every_program_of_decoding_lowers(program):
    """Every state that a fold takes comes out in the same memory."""
    text = jax.jit(program.function).trace(*program.arguments).lower(lowering_platforms=("cuda",)).as_text()
    name = program.name.partition("-")[0]
    assert text.count("custom_call @mosaic_gpu") == 1
    assert rf"\00{name}_mosaic_gpu\00" in text
    aliases = 0 if name == "decode_step" else 4 if program.name.endswith("-rollback") else 2
    assert text.count("#stablehlo.output_operand_alias<") == aliases


@pytest.mark.parametrize("program", ELEMENTWISE, ids=lambda program: program.name)
def test_every_elementwise_program_lowers(program):
    text = jax.jit(program.function).trace(*program.arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert rf"\00{program.name.partition('-')[0]}_mosaic_gpu\00" in text


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch):
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)


B, T, H, G, K = 2, 256, 4, 2, 64
Q = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
KV = jax.ShapeDtypeStruct((B, T, G, K), jnp.bfloat16)
DECAY = jax.ShapeDtypeStruct((B, T, G), jnp.float32)

attend = functools.partial(decay_attention, form="parallel", implementation="mosaic_gpu")


def loss(q, k, v, log_decay, **options):
    return attend(q, k, v, log_decay, **options).astype(jnp.float32).sum()


def gradients(function):
    return jax.value_and_grad(function, argnums=(0, 1, 2, 3))


def stacked(x, axis=0):
    return jax.ShapeDtypeStruct((*x.shape[:axis], 3, *x.shape[axis:]), x.dtype)


def test_without_gradients():
    assert lower(attend, Q, KV, KV, DECAY) == [(FORWARD, Q.shape)]


def test_vmap():
    """The mapped axis is an operand's axis: no kernel is repeated."""
    arguments = [stacked(x, axis=1) for x in (Q, KV, KV, DECAY)]
    found = quadratic_kernels(jax.vmap(gradients(loss), in_axes=1), *arguments)
    assert [name for name, _ in found] == [FORWARD, QUERIES, KEYS]
    assert all(sorted(shape) == sorted((3, B, T, H, K)) for _, shape in found)


def test_checkpoint_computes_the_forward_kernel_again():
    assert traced(gradients(jax.checkpoint(loss)), Q, KV, KV, DECAY) == [FORWARD, FORWARD, QUERIES, KEYS]


def test_the_policy_of_models_keeps_what_the_kernels_need():
    """On a mesh, where each device keeps its own; and in chunks, of which this counts the calls."""
    keep = functools.partial(jax.checkpoint, policy=DEAR)
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        split = functools.partial(loss, partition=PartitionSpec("data"))
        assert traced(gradients(keep(split)), Q, KV, KV, DECAY) == [FORWARD, QUERIES, KEYS]

    def counts(wrap):
        program = str(jax.make_jaxpr(gradients(wrap(functools.partial(loss, form="chunked"))))(Q, KV, KV, DECAY))
        return [len(re.findall(rf"name={name}\b", program)) for name in ("query", "update")]

    # `query` for y and dv, and y again; `update` for the states and their gradients, and the states again.
    wraps = functools.partial(keep, policy=REMATS["states"].keywords["policy"]), keep, (lambda f: f), jax.checkpoint
    wanted = [[2, 2], [2, 3], [2, 2], [3, 3]][: None if EXHAUSTIVE else 2]
    assert [counts(wrap) for wrap in wraps[: len(wanted)]] == wanted


@pytest.mark.parametrize("remat", [False, True] if EXHAUSTIVE else [True])
def test_scan_over_layers(remat):
    """A kernel for all layers, with rematerialisation as in a model."""

    def layer(x, log_decay):
        return attend(x, x, x, log_decay)

    layer = jax.checkpoint(layer) if remat else layer

    def layers(x, decays):
        return jax.lax.scan(lambda x, decay: (layer(x, decay), None), x, decays)[0].astype(jnp.float32).sum()

    found = traced(jax.value_and_grad(layers, argnums=(0, 1)), KV, stacked(DECAY))
    assert found == ([FORWARD, FORWARD, QUERIES, KEYS] if remat else [FORWARD, QUERIES, KEYS])


@pytest.mark.parametrize(
    ("sizes", "partition", "local"),
    [
        ((1, 2), PartitionSpec("data", None, "tensor"), (2, T, 2, K)),
        ((2, 1), PartitionSpec(("data", "tensor")), (1, T, 4, K)),
        ((2, 1), PartitionSpec("data", None, "tensor"), (1, T, 4, K)),
        ((2, 1), PartitionSpec(None, None, "data"), (2, T, 2, K)),
    ][: None if EXHAUSTIVE else 1],
)
def test_each_device_computes_its_part(sizes, partition, local):
    """On meshes that tracing needs no devices for."""
    mesh = AbstractMesh(sizes, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def split(q, k, v, log_decay, rows):
        return loss(q, k, v, log_decay, segment_ids=rows, partition=partition)

    with jax.sharding.use_abstract_mesh(mesh):
        found = quadratic_kernels(gradients(split), Q, KV, KV, DECAY, rows)
    assert found == [(name, local) for name in (FORWARD, QUERIES, KEYS)]
