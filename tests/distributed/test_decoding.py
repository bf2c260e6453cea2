"""Generation on several devices is that on one, and its cache is cut over rows and heads from beginning to end."""

import flax.linen as nn
import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from support.exhaustive import EXHAUSTIVE
from support.models import config_of

from train.sharding import MESH_AXES, ONE_ROW_RULES, RULES
from twomamba_jax import init_cache

ROUNDING = 32  # as in test_model_variants.py
NAMES = ["2mamba", "softmax", *(["2mamba-e", "mamba2", "mamba2-released"] if EXHAUSTIVE else [])]  # as in decoding.py


@pytest.fixture(scope="module")
def found(simulate):
    return simulate("decoding.py")


@pytest.mark.parametrize("name", NAMES)
def test_generation_on_a_mesh_is_that_of_one_device(found, name):
    """Ragged prompts, folds at different steps in different rows; 4 devices for the rows, 2 for the heads."""
    result = found[name]
    assert result["tokens"]
    assert result["error"] <= ROUNDING
    assert result["gap"] > 2 * ROUNDING  # no tie that rounding could decide
    assert result["rows"] > 4
    assert result.get("sequence", True)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_stays_on_its_devices(found, name):
    """Each has a quarter of the rows and half of the heads, and gives them up; activations alone are exchanged."""
    result = found[name]
    for path, (whole, part) in result["shapes"].items():
        rows, heads = (0, None) if path == ".position" else (1, 3 if "convolution" in path else 2)
        # What heads share is whole on every device.
        cut = [max(1, size // {rows: 4, heads: 2}.get(axis, 1)) for axis, size in enumerate(whole)]
        assert part == cut, path
    assert result["donated"]
    assert result["sent"] == [2 * 7 * 32, 2 * 32]  # a device's rows, their tokens, d_model


@pytest.mark.parametrize(("batch", "kv_heads", "what"), [(6, 2, "6 rows of the batch"), (4, 1, "1 key/value heads")])
def test_a_cache_that_does_not_divide_is_refused(batch, kv_heads, what):
    mesh = AbstractMesh((4, 1, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    config = config_of("2mamba", num_kv_heads=kv_heads)
    with jax.sharding.use_abstract_mesh(mesh):
        with nn.logical_axis_rules(RULES), pytest.raises(ValueError, match=f"{what} cannot be sharded over the"):
            init_cache(config, batch, 8)
        with nn.logical_axis_rules(ONE_ROW_RULES):  # rows that are on every device
            jax.eval_shape(lambda: init_cache(config_of("2mamba"), batch, 8))
