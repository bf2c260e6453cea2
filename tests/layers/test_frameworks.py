"""The examples of docs/frameworks.md run, as they stand."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.exhaustive import exhaustive
from support.models import model_of

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()
EXAMPLES = dict(re.findall(r"## ([^\n]+)\n.*?```python\n(.*?)```", PAGE, re.DOTALL))


# Continuous integration runs these too.
LONG = {
    "NNX": exhaustive("test_parameters.py, which has the names that a bridge shards by"),
    "A Flax module of your own, with optax": exhaustive("tests/train, whose steps are of Flax modules with optax"),
    "Truncated backpropagation": exhaustive("test_conformance.py, whose calls pass on states and their gradients"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in EXAMPLES])
def test_example_runs(name):
    names = {}
    exec(compile(EXAMPLES[name], f"docs/frameworks.md: {name}", "exec"), names)  # the point of the test
    CHECKS[name](names)


def losses_fall(names):
    losses = [float(loss) for loss in names["losses"]]
    assert losses[-1] < losses[0]


def gradient_is_the_whole_sequences(names):
    assert names["gradients"].keys() == names["params"].keys()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(names["gradients"]))
    # With the state's gradient passed back too, two pieces give the gradient of the whole.
    whole = jax.jit(jax.grad(names["loss_of_all"]))(names["params"], names["x"])
    pieces = names["gradients"]
    for key in whole:
        assert jnp.allclose(whole[key], pieces[key], rtol=1e-4, atol=1e-6), key


CHECKS = {
    "NNX": losses_fall,
    "Plain JAX, or Equinox": losses_fall,
    "A Flax module of your own, with optax": losses_fall,
    "Truncated backpropagation": gradient_is_the_whole_sequences,
}


def test_every_example_has_a_check():
    assert EXAMPLES.keys() == CHECKS.keys()


@LONG["NNX"]
def test_bridge_shards_by_mesh_and_rules():
    """Without rules, names are not taken for axes of a mesh."""
    model, tokens = model_of("softmax"), jnp.zeros((1, 4), jnp.int32)

    def head_spec():
        bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), tokens)
        assert bridged.head.get_metadata()["out_sharding"] == ("embed", "vocab")
        return tuple(bridged.head.get_value().sharding.spec)

    rules = (("embed", "fsdp"), *((name, None) for name in ("vocab", "mlp", "heads", "kv_heads", "head_dim", "conv")))
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert head_spec() == ()
        with nn.logical_axis_rules((*rules, ("layers", None))):
            assert head_spec() == ("fsdp", None)
