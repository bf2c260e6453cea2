"""What parameters a model has: their logical axes, number, initial values, and the runs that they are stacked in."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import config_of

from twomamba_jax import VARIANTS, LanguageModel, ModelConfig, parse_pattern

pytestmark = pytest.mark.quick

# The names of architecture.md for parameters, and those that grouped heads and convolutions add.
AXES = {"embed", "mlp", "heads", "head_dim", "vocab", "layers", "kv_heads", "qk_groups", "conv"}


def boxes_of(config):
    """{path: box} of the abstract parameters, each in the box that carries its axis names."""
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)["params"]
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    return {"/".join(key.key for key in path): box for path, box in leaves}


def test_every_parameter_has_its_axes():
    """The table of a model with everything in it: Mamba-2 whole, then two 2Mamba layers."""
    boxes = boxes_of(config_of("mamba2,2mamba*", 3))
    layer = {
        "mixer_norm/scale": ("embed",),
        "mixer/q/kernel": ("embed", "heads", "head_dim"),
        "mixer/k/kernel": ("embed", "kv_heads", "head_dim"),
        "mixer/v/kernel": ("embed", "kv_heads", "head_dim"),
        "mixer/conv_q_kernel": ("conv", "heads", "head_dim"),
        "mixer/conv_k_kernel": ("conv", "kv_heads", "head_dim"),
        "mixer/conv_v_kernel": ("conv", "kv_heads", "head_dim"),
        "mixer/conv_q_bias": ("heads", "head_dim"),
        "mixer/conv_k_bias": ("kv_heads", "head_dim"),
        "mixer/conv_v_bias": ("kv_heads", "head_dim"),
        "mixer/out/kernel": ("heads", "head_dim", "embed"),
        "mlp_norm/scale": ("embed",),
        "mlp/gate/kernel": ("embed", "mlp"),
        "mlp/up/kernel": ("embed", "mlp"),
        "mlp/down/kernel": ("mlp", "embed"),
    }
    mamba2 = layer | {
        "mixer/dt/kernel": ("embed", "kv_heads"),
        "mixer/dt_bias": ("kv_heads",),
        "mixer/A_log": ("kv_heads",),
        "mixer/D": ("heads", "head_dim"),
        "mixer/z/kernel": ("embed", "heads", "head_dim"),
        "mixer/z/bias": ("heads", "head_dim"),
        "mixer/norm/scale": ("heads", "head_dim"),
    }
    squared = layer | {"mixer/decay/kernel": ("embed", "kv_heads")}
    expected = {"embedding/embedding": ("vocab", "embed"), "norm/scale": ("embed",), "head": ("embed", "vocab")}
    expected |= {f"layers_0/{path}": ("layers", *names) for path, names in mamba2.items()}
    expected |= {f"layers_1/{path}": ("layers", *names) for path, names in squared.items()}
    assert {path: box.names for path, box in boxes.items()} == expected

    sizes = {
        "vocab": {23}, "embed": {32}, "mlp": {48}, "heads": {4}, "kv_heads": {2}, "head_dim": {8}, "conv": {4, 2},
        "layers": {1, 2},
    }  # fmt: skip
    for path, box in boxes.items():
        for name, size in zip(box.names, box.value.shape, strict=True):
            assert size in sizes[name], (path, name, size)


def test_released_mamba2_names_its_groups_and_has_no_head():
    """State-spaces' 130m: 128,989,632 parameters, the head among them once, as the embedding."""
    config = ModelConfig(
        vocab_size=50288, d_model=768, num_layers=24, num_heads=24, head_dim=64, mlp_dim=0, tie_embeddings=True,
        mixers=parse_pattern("mamba2-released", 24),
    )  # fmt: skip
    boxes = boxes_of(config)
    assert sum(box.value.size for box in boxes.values()) == 128_989_632
    layer = {path.removeprefix("layers_0/mixer/"): box for path, box in boxes.items() if "mixer/" in path}
    found = {path: (box.names[1:], box.value.shape[1:]) for path, box in layer.items()}
    assert "head" not in boxes
    assert {path for path in boxes if path.startswith("layers_0/mlp")} == set()
    for name in "qk":
        assert found[f"{name}/kernel"] == (("embed", "qk_groups", "head_dim"), (768, 1, 128))
        assert found[f"conv_{name}_kernel"] == (("conv", "qk_groups", "head_dim"), (4, 1, 128))
        assert found[f"conv_{name}_bias"] == (("qk_groups", "head_dim"), (1, 128))
    assert found["v/kernel"] == (("embed", "kv_heads", "head_dim"), (768, 24, 64))
    assert found["D"] == (("heads",), (24,))
    assert "z/bias" not in found


def test_blocks_without_an_mlp_have_a_mixer_alone():
    boxes = boxes_of(dataclasses.replace(config_of("2mamba", 1), mlp_dim=0))
    assert {path.split("/")[1] for path in boxes if path.startswith("layers_0")} == {"mixer_norm", "mixer"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_names_every_axis(name):
    for path, box in boxes_of(config_of(name, 1)).items():
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim, path
        assert set(box.names) <= AXES, path


@pytest.mark.parametrize(
    ("pattern", "sizes", "count"),
    [
        ("softmax", (1024, 20, 16, 2048), 275_293_184),
        ("2mamba", (1024, 20, 16, 2048), 275_805_184),
        ("softmax", (1536, 27, 24, 3072), 735_398_400),
        ("2mamba", (1536, 27, 24, 3072), 736_766_976),
    ],
    ids=["small-softmax", "small-2mamba", "medium-softmax", "medium-2mamba"],
)
def test_parameter_counts_of_the_paper(pattern, sizes, count):
    d_model, num_layers, num_heads, mlp_dim = sizes
    config = ModelConfig(
        vocab_size=32000, d_model=d_model, num_layers=num_layers, num_heads=num_heads, head_dim=64, mlp_dim=mlp_dim,
        mixers=parse_pattern(pattern, num_layers),
    )  # fmt: skip
    assert sum(box.value.size for box in boxes_of(config).values()) == count


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [("2mamba", [5]), ("softmax,2mamba*,softmax", [1, 3, 1]), ("2mamba*2,2mamba-e,2mamba*", [2, 1, 2])],
)
def test_equal_neighbours_are_one_run(pattern, counts):
    config = config_of(pattern, 5)
    assert [count for _, count in config.layer_runs] == counts
    assert [mixer for mixer, count in config.layer_runs for _ in range(count)] == list(config.layer_mixers)
    boxes = boxes_of(config)
    assert [boxes[f"layers_{run}/mixer/q/kernel"].value.shape[0] for run in range(len(counts))] == counts
    assert f"layers_{len(counts)}/mixer/q/kernel" not in boxes


def test_initial_values():
    """Appendix B: N(0, 0.02) outside the mixer; each layer of a run draws its own."""
    config = config_of("linear", 2)
    init = jax.jit(lambda key, tokens: nn.unbox(LanguageModel(config).init(key, tokens)["params"]))
    params = jax.tree.map(np.asarray, init(jax.random.key(0), np.zeros((1, 4), np.int32)))
    layer = params["layers_0"]
    for kernel in (
        params["embedding"]["embedding"],
        params["head"],
        *(layer["mlp"][n]["kernel"] for n in layer["mlp"]),
    ):
        # Of n draws, mean and deviation are off by 0.02 / sqrt(n) and 0.02 / sqrt(2 n): 5 of these allowed.
        assert abs(np.mean(kernel)) < 5 * 0.02 / np.sqrt(kernel.size)
        assert abs(np.std(kernel) - 0.02) < 5 * 0.02 / np.sqrt(2 * kernel.size)
    for scale in (params["norm"]["scale"], layer["mixer_norm"]["scale"], layer["mlp_norm"]["scale"]):
        np.testing.assert_array_equal(scale, 1)
    for kernel in (layer["mlp"]["gate"]["kernel"], layer["mixer"]["q"]["kernel"]):
        assert (kernel[0] != kernel[1]).all()
