"""The model as a whole: layers in their order, documents, execution choices, refused tokens."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.models import model_of, params_of

from train.sharding import MESH_AXES, RULES
from twomamba_jax import VARIANTS, Execution, RMSNorm, head_kernel, init_cache
from twomamba_jax.layers import Block, language_model, mixer

PATTERN = "softmax,2mamba*,mamba2"
TOKENS = np.random.default_rng(0).integers(23, size=(2, 13))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, segment_ids=None):
    return model.apply({"params": params}, tokens, segment_ids=segment_ids)


def assert_close(actual, expected):
    """Within rounding: 32 times float32's epsilon times the largest number expected.

    Each model below is within 6 epsilon of itself in float64, in every form. A fault is 1e4 and more.
    """
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(actual) - np.asarray(expected)).max() / (np.finfo(np.float32).eps * scale)
    assert error <= 32


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def test_hybrid_is_its_blocks_in_order():
    """Three scanned runs, the middle one of two layers, against the blocks one after the other."""
    model = model_of(PATTERN, 4)
    config, params = model.config, params_of(model)
    assert [count for _, count in config.layer_runs] == [1, 2, 1]
    assert {name for name in params if name.startswith("layers_")} == {"layers_0", "layers_1", "layers_2"}

    @jax.jit
    def by_hand(params, tokens):
        x, rest = (
            params["embedding"]["embedding"][tokens],
            (*[None] * 5, jnp.broadcast_to(jnp.arange(13), (2, 13))),
        )
        for run, layer, name in ((0, 0, "softmax"), (1, 0, "2mamba"), (1, 1, "2mamba"), (2, 0, "mamba2")):
            layer_params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params[f"layers_{run}"])
            block = Block(config=config, mixer=VARIANTS[name].mixer, execution=Execution())
            x, _ = block.apply({"params": layer_params}, x, *rest)
        return RMSNorm().apply({"params": params["norm"]}, x) @ params["head"]

    assert_close(logits_of(model, params, TOKENS), by_hand(params, TOKENS))


def test_tied_head_is_the_embedding():
    """And a model without ties, its head set to the transposed embedding, has the same logits."""
    model = model_of("2mamba")
    untied = params_of(model)
    tied = {name: tree for name, tree in untied.items() if name != "head"}
    same = untied | {"head": untied["embedding"]["embedding"].T}
    config = dataclasses.replace(model.config, tie_embeddings=True)
    assert jax.tree.structure(tied) == jax.tree.structure(params_of(model.clone(config=config)))
    np.testing.assert_array_equal(head_kernel(tied), same["head"])
    assert head_kernel(untied) is untied["head"]
    assert_close(logits_of(model.clone(config=config), tied, TOKENS), logits_of(model, same, TOKENS))


def test_packed_documents_equal_the_documents_alone():
    """A softmax with rotary positions, 2Mamba and Mamba-2 layers; the third document repeats the first one's id."""
    model = model_of(PATTERN, 4)
    params = params_of(model)
    edges = (0, 5, 6, 13)
    segment_ids = np.array([[4] * 5 + [2] + [4] * 7] * 2)
    packed = logits_of(model, params, TOKENS, segment_ids)
    for start, end in itertools.pairwise(edges):
        alone = logits_of(model, params, np.roll(TOKENS, -start, axis=1))  # what is behind it is out of its sight
        assert_close(packed[:, start:end], alone[:, : end - start])
    mixed = logits_of(model, params, TOKENS)
    assert np.abs(packed - mixed)[:, 5:].max(axis=-1).min() > 1e-3  # or the ids were not read


@exhaustive("test_packing.py, which has the same of training rows in float64")
def test_no_gradient_crosses_the_edge_of_a_document():
    """Of the second document's loss, with respect to each token's embedding: exactly 0 outside it."""
    model = model_of(PATTERN, 3)
    params = params_of(model)
    tokens, segment_ids = jnp.arange(12)[None], jnp.array([[0] * 4 + [1] * 5 + [0] * 3])  # a token is its place

    @jax.jit
    def gradient(embedding):
        def loss(embedding):
            changed = params | {"embedding": {"embedding": embedding}}
            return jax.nn.logsumexp(model.apply({"params": changed}, tokens, segment_ids=segment_ids)[:, 4:9])

        return jax.grad(loss)(embedding)

    size = np.abs(gradient(params["embedding"]["embedding"])).max(axis=-1)[:12]
    np.testing.assert_array_equal(size[:4], 0)
    np.testing.assert_array_equal(size[9:], 0)
    assert (size[4:9] > 1e-4).all()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"] if EXHAUSTIVE else ["bfloat16"])
def test_gradients_of_a_frequent_token_add_up(param_dtype):
    """Over 1024 tokens, in bfloat16: a sum in it would stand still at 256 times what it adds."""
    tokens = np.full((64, 16), 3)

    def gradient(**execution):
        model = model_of("linear", 1, **execution)
        params = jax.tree.map(lambda x: np.asarray(x).astype(param_dtype), params_of(model_of("linear", 1)))
        total = jax.jit(jax.grad(lambda params: model.apply({"params": params}, tokens)[..., 0].sum()))(params)
        return np.asarray(total["embedding"]["embedding"])[3].astype(np.float32)

    want = gradient()
    got = gradient(dtype="bfloat16", param_dtype=param_dtype)
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_devices_pass_on_rows_of_the_embedding_in_the_dtype_of_their_use():
    """Where fsdp cuts them; their gradients come back as they are, and x is what it is on one device."""
    model = model_of("linear", 1, dtype="bfloat16")
    params = params_of(model_of("linear", 1))
    table = params["embedding"]["embedding"]
    mesh = AbstractMesh((1, 2, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        text = str(jax.make_jaxpr(lambda *x: model.apply(*x))({"params": params}, jnp.asarray(TOKENS)))
    vocab, width = table.shape
    assert f"bf16[{vocab},{width}] = sharding_constraint" in text
    assert f"f32[{vocab},{width}] = sharding_constraint" not in text
    rows, pull = jax.vjp(lambda table: language_model._rounded_whole_rows(table, "bfloat16"), table)
    np.testing.assert_array_equal(rows, table.astype("bfloat16").astype("float32"))
    gradient = np.random.default_rng(0).normal(size=table.shape).astype("float32")
    np.testing.assert_array_equal(pull(jnp.asarray(gradient))[0], gradient)


@exhaustive("train/test_layer_loop.py, where gradients with remat are those without")
@pytest.mark.parametrize("scan_layers", [None, False])
def test_remat_changes_memory_alone(scan_layers):
    """Gradients are equal; a row of 64 in four layers has its scores kept by `none`, its projections also by `dots`."""
    tokens = np.random.default_rng(0).integers(23, size=(2, 64))

    def loss(model, params):
        logits = model.apply({"params": params}, tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    plain = model_of("linear", 4)
    params, found = params_of(plain), {}
    names = "none", "dots", "full"
    for remat in names:
        model = model_of("linear", 4, remat=remat, scan_layers=scan_layers)
        assert jax.tree.structure(params_of(model)) == jax.tree.structure(params)
        program = jax.jit(jax.value_and_grad(functools.partial(loss, model))).lower(params).compile()
        found[remat] = program(params), program.memory_analysis().temp_size_in_bytes
    for remat in names[1:]:
        jax.tree.map(assert_close, found[remat][0], found["none"][0])
    none, dots, full = (temporary for _, temporary in found.values())
    assert none > (2 if scan_layers is None else 1.5) * dots
    assert dots > 1.2 * full


EXECUTIONS = [("2mamba", {"chunk_size": 4}), ("softmax,2mamba", {"chunk_size": 4})]
EXECUTIONS += [("2mamba", {"form": "recurrent"}), ("2mamba", {"precision": "highest"})]


@exhaustive("test_execution_reaches_the_operation, and test_conformance.py, for what it does there")
@pytest.mark.parametrize(("pattern", "execution"), EXECUTIONS, ids=str)
def test_execution_changes_no_logits(pattern, execution):
    layers = len(pattern.split(","))
    plain, other = model_of(pattern, layers), model_of(pattern, layers, **execution)
    params = params_of(plain)
    assert_close(logits_of(other, params, TOKENS), logits_of(plain, params, TOKENS))


@pytest.fixture
def calls(monkeypatch):
    """The (arguments, options) of every call that a mixer makes of the operation."""
    record = []

    def spy(function):
        def called(*args, **options):
            record.append((args, options))
            return function(*args, **options)

        return called

    for module, name in ((mixer, "decay_attention"), (mixer.cached_attention, "read")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return record


def test_execution_reaches_the_operation(calls):
    """Form, chunk size, implementation and precision arrive; a form that a score lacks is refused, not replaced."""

    def options_of(pattern, tokens=TOKENS, cached=False, **execution):
        model = model_of(pattern, **execution)
        cache = init_cache(model.config, 2, 16) if cached else None
        jax.eval_shape(functools.partial(model.init_with_output, jax.random.key(0)), tokens, cache=cache)
        return calls[-1][1]

    chunked = options_of("2mamba", chunk_size=4, implementation="xla", precision="highest")
    names = ("score", "normalize", "form", "chunk_size", "implementation", "precision")
    assert [chunked[name] for name in names] == ["squared", True, None, 4, "xla", "highest"]
    assert options_of("2mamba", form="recurrent")["form"] == "recurrent"
    with pytest.raises(ValueError, match="score='exp' has none"):
        options_of("softmax", form="recurrent")
    assert options_of("softmax", form="parallel")["form"] == "parallel"
    assert options_of("mamba2")["scale"] == 1
    step = options_of("mamba2", TOKENS[:, :1], cached=True, precision="highest")
    assert (step["score"], step["normalize"], step["scale"], step["precision"]) == ("linear", False, 1, "highest")


def test_implementation_that_this_machine_lacks_is_refused():
    model = model_of("2mamba", implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def test_bfloat16_keeps_wide_what_must_be(calls):
    """Parameters, decays, states and logits are float32; the residual stream, q, k, v and the inputs cached are not."""
    model = model_of(PATTERN, 3, dtype=jnp.bfloat16)
    cache = init_cache(model.config, 2, 16, dtype=jnp.bfloat16)
    (logits, after), variables = jax.eval_shape(
        functools.partial(model.init_with_output, jax.random.key(0)), TOKENS, cache=cache
    )
    narrow, wide = {jnp.dtype("bfloat16")}, {jnp.dtype("float32")}
    assert {logits.dtype} == dtypes(variables) == wide
    softmax, two, mamba2 = after.layers
    assert dtypes((softmax.attention.keys, two.attention.values)) == narrow
    assert dtypes((two.attention.log_decay, two.attention.state, mamba2.attention.state)) == wide
    assert dtypes((two.convolution, mamba2.convolution)) == narrow
    assert len(calls) >= 3
    for (q, k, v, log_decay, *_), _ in calls:
        assert dtypes((q, k, v)) == narrow
        assert log_decay is None or {log_decay.dtype} == wide

    block = Block(config=model.config, mixer=VARIANTS["mamba2"].mixer, execution=model.execution)
    x = jnp.zeros((2, 13, 32), jnp.bfloat16)
    (y, _), _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x, *[None] * 6)
    assert {y.dtype} == narrow


def test_parameters_have_the_asked_dtype():
    model = model_of("mamba2", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert dtypes(jax.eval_shape(model.init, jax.random.key(0), TOKENS)) == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(4, np.int32), np.zeros((1, 2, 3), np.int32), np.zeros((1, 4), np.float32), np.zeros((1, 0), np.int32)],
    ids=lambda tokens: f"{tokens.dtype}{tokens.shape}",
)
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\] with T >= 1, got") as error:
        jax.eval_shape(model_of("linear").init, jax.random.key(0), tokens)
    assert str(tokens.shape) in str(error.value)


def test_execution_refuses_what_it_does_not_know():
    for wrong, message in (
        ({"remat": True}, "remat=True is unknown: expected one of none, states, dots, full"),
        ({"scan_layers": 0}, "scan_layers=0 must be None, True or False"),
        ({"elementwise_kernels": None}, "elementwise_kernels=None must be True or False"),
        ({"concurrent_kernels": 1}, "concurrent_kernels=1 must be True or False"),
        ({"form": "fast"}, "form='fast' is unknown: expected None or one of parallel, chunked, recurrent"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown"),
        ({"precision": "low"}, "precision='low' is unknown: expected None or one of highest"),
        ({"chunk_size": 0}, "chunk_size=0 must be an integer of at least 1"),
        ({"chunk_size": 2.5}, "chunk_size=2.5 must be an integer of at least 1"),
        ({"chunk_size": 4, "form": "parallel"}, "chunk_size=4 needs form='chunked' or None, got form='parallel'"),
    ):
        with pytest.raises(ValueError, match=message):
            Execution(**wrong)
    assert dataclasses.replace(Execution(), chunk_size=4, form="chunked").chunk_size == 4
