"""Sequence parallelism: the operation with its tokens sharded over devices, and what the devices of a model say.

That a model's step is that of one device is for test_meshes.py.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.models import config_of, model_of

from train.sharding import MESH_AXES, RULES
from twomamba_jax import decay_attention, init_cache


@pytest.fixture(scope="module")
def operation(simulate):
    return simulate("sequence_operation.py")


@pytest.fixture(scope="module")
def collectives(simulate):
    return simulate("sequence_collectives.py")


def test_the_operation_equals_the_oracle_in_float64(operation):
    """Outputs, final states and every gradient."""
    for name, errors in operation["cases"].items():
        assert {"y", "dq", "dk", "dv"} <= errors.keys()
        assert max(errors.values()) < 1e-12, name


def test_states_enter_any_number_of_devices(operation):
    """Two to eight of them, forwards and backwards, with a state before the first and without."""
    assert operation["entering"] < 1e-14


@exhaustive("the operation's test above, whose rows are packed, and whose oracle lets nothing across an edge")
@pytest.mark.parametrize("score", ["squared", "exp"])
def test_packed_documents_are_as_if_alone(operation, score):
    packed = operation["packed"][score]
    assert packed["difference"] < 1e-13
    assert packed["crossing"] == 0


def test_a_model_passes_on_states_that_do_not_grow_with_the_tokens():
    """Traced: in the gradient of packed rows states, their decays and the last segment go from device to device."""
    mesh = AbstractMesh((1, 1, 1, 8), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    model, example = model_of("2mamba"), jnp.zeros((1, 8), jnp.int32)

    def loss(params, ids):
        return model.apply({"params": params}, ids, segment_ids=ids).sum()

    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        params = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), example)["params"]))
        tokens = jax.ShapeDtypeStruct((2, 8 * 11), jnp.int32)  # no other axis is of 11, or a multiple
        text = str(jax.make_jaxpr(jax.grad(loss))(params, tokens))
    assert "all_gather" not in text
    lines = [line.partition(" = ppermute")[0] for line in text.splitlines() if " = ppermute" in line]
    passed_on = re.findall(r":\w+\[([\d,]*)\]", " ".join(lines))
    assert len(passed_on) > 6
    sizes = [int(size) for shape in passed_on for size in shape.split(",") if size]
    assert all(size % 11 for size in sizes)


compiled = exhaustive("the test above, of what is traced, and test_sequence_kernels.py, of the kernels")


@compiled
@pytest.mark.parametrize("name", ["2mamba", "mamba2"])
def test_models_of_finite_states_pass_on_states_only(collectives, name):
    """States and the convolution's inputs go to the next device; of gradients only the parameters' are summed."""
    assert collectives[name].keys() == {"collective-permute", "all-reduce"}


@compiled
def test_what_devices_say_does_not_grow_with_the_tokens(collectives):
    assert collectives["2mamba of twice the tokens"] == collectives["2mamba"]


@compiled
def test_exp_gathers_keys_values_and_decays(collectives):
    """Two heads of 8: forward, and again the same in the backward pass's reduce-scatter, an eighth of it left."""
    gathered = collectives["2mamba-e"]["all-gather"]
    batch, tokens, heads, size, devices = 2, 64, 2, 8, 8
    runs = 4 * batch * (tokens + devices)  # of every token, and their number on every device
    arrays = 4 * batch * tokens * heads * (2 * size + 1)
    assert gathered == arrays + runs
    assert collectives["2mamba-e"]["reduce-scatter"] == arrays // devices


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        ((2, 63), (2, 2), "63 tokens cannot be sharded over the 4 devices of mesh axis 'sequence'"),
        ((3, 64), (2, 2), "3 rows of the batch cannot be sharded over the 2 devices of mesh axis 'data'"),
        ((2, 64), (3, 1), "3 query heads cannot be sharded over the 2 devices of mesh axis 'tensor'"),
        ((2, 64), (2, 1), "1 key/value heads cannot be sharded over the 2 devices of mesh axis 'tensor'"),
    ],
)
def test_sizes_that_do_not_divide(shape, heads, message):
    mesh = AbstractMesh((2, 2, 4), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
    q, k = (jax.ShapeDtypeStruct((*shape, n, 8), jnp.float32) for n in heads)

    def attend(q, k):
        return decay_attention(q, k, k, partition=PartitionSpec("data", "sequence", "tensor"))

    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, q, k)


CALLS = [("2mamba", 21), ("softmax", 1), *([("2mamba", 1), ("softmax", 5)] if EXHAUSTIVE else [])]


@pytest.mark.parametrize(("pattern", "count"), CALLS)
def test_tokens_with_a_cache_are_not_sharded(pattern, count):
    """Any number of them: generation goes on under the mesh of training."""
    model, cache = model_of(pattern), init_cache(config_of(pattern), 2, 32)
    mesh = AbstractMesh((2, 1, 1, 4), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        # Parameters are made for any example, also one that the mesh does not divide.
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
        tokens = jax.ShapeDtypeStruct((2, count), jnp.int32)
        text = str(jax.make_jaxpr(lambda *x: model.apply(*x, cache=cache)[0])(params, tokens))
    assert "ppermute" not in text
    assert "all_gather" not in text
