"""What a configuration refuses, and what it derives."""

import dataclasses
import re

import pytest

from twomamba_jax import MixerConfig, ModelConfig

pytestmark = pytest.mark.quick

MIXER = {"score": "squared", "norm": "softmax"}
MODEL = {
    "vocab_size": 23, "d_model": 32, "num_layers": 3, "num_heads": 4, "head_dim": 8, "mlp_dim": 48,
    "mixers": MixerConfig(**MIXER),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "cubed"}, "score='cubed' is unknown: expected one of 'linear', 'squared', 'exp'"),
        ({"norm": "layer"}, "norm='layer' is unknown: expected one of 'softmax', 'output'"),
        ({"activation": "gelu"}, "activation='gelu' is unknown: expected one of 'none', 'relu', 'silu'"),
        ({"activation_on": "v"}, "activation_on='v' is unknown: expected one of 'qk', 'qkv'"),
        ({"decay": "sigmoid"}, "decay='sigmoid' is unknown: expected one of 'none', 'discretized', 'softplus', 'memo"),
        ({"conv_width": 0}, "conv_width=0 must be 1 (no convolution), 2, 3 or 4"),
        ({"conv_width": 5}, "conv_width=5 must be 1 (no convolution), 2, 3 or 4"),
        ({"scale": 0.0}, "scale=0.0 must be a positive number, or None for 1 / sqrt(K)"),
        ({"scale": -1.0}, "scale=-1.0 must be a positive number"),
        ({"scale": float("nan")}, "scale=nan must be a positive number"),
        ({"score": "exp", "norm": "output"}, "score='exp' with norm='output' is undefined"),
        ({"score": "linear"}, "score='linear' with norm='softmax' divides by a sum of scores"),
        ({"score": "linear", "activation": "silu"}, "score='linear' with norm='softmax' divides by a sum of scores"),
        (
            {"score": "linear", "activation": "relu", "rope": True},
            "score='linear' with norm='softmax' divides by a sum of scores, which must not be negative: use "
            "activation='relu' and rope=False, or norm='output'",
        ),
        ({"activation_on": "qkv"}, "activation_on='qkv' needs an activation: activation='none' has nothing to apply"),
        ({"dt_bias": True}, "dt_bias=True needs a dt: set discretize_values=True or decay='discretized'"),
        ({"dt_bias": True, "decay": "softplus"}, "dt_bias=True needs a dt"),
        ({"qk_dim": 0}, "qk_dim=0 must be an integer of at least 1, or None"),
        ({"qk_dim": 7, "rope": True}, "qk_dim=7 must be even: rotary embeddings turn pairs"),
        ({"half_lives": (1, 9)}, "half_lives are the softplus decay's, and this is decay='none': omit them"),
        (
            {"half_lives": (9, 1), "decay": "softplus"},
            "half_lives=(9, 1) must be (shortest, longest), positive numbers",
        ),
        (
            {"half_lives": (0, 1), "decay": "softplus"},
            "half_lives=(0, 1) must be (shortest, longest), positive numbers",
        ),
        ({"qk_groups": 0}, "qk_groups=0 must be an integer of at least 1, or None"),
        ({"norm_groups": None, "norm": "output"}, "norm_groups=None must be an integer of at least 1"),
        ({"norm_groups": 2}, "norm_groups=2 are the output norm's, and this is norm='softmax'"),
        ({"conv_bias": False}, "conv_bias=False needs a convolution: set conv_width=2, 3 or 4"),
        ({"z_bias": False}, "z_bias=False needs a gate: set z_gate=True"),
        ({"d_per_head": True}, "d_per_head=True needs a D: set d_residual=True"),
        ({"z_bias": "no", "z_gate": True}, "z_bias='no' must be True or False"),
        ({"half_lives": (5,), "decay": "softplus"}, "half_lives=(5,) must be (shortest, longest), positive numbers"),
    ],
    ids=str,
)
def test_mixer_that_defines_no_model_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MixerConfig(**MIXER | change)


@pytest.mark.parametrize(
    "change",
    [
        {"score": "linear", "activation": "relu"},
        {"score": "linear", "norm": "output", "rope": True},
        {"norm": "output"},
        {"score": "exp", "rope": True, "conv_width": 4, "decay": "softplus"},
        {"activation": "silu", "activation_on": "qkv"},
        {"decay": "discretized", "dt_bias": True},
        {"discretize_values": True, "dt_bias": True},
        {"scale": 1.0},
        {"qk_dim": 7},
        {"qk_groups": 2},
        {"norm": "output", "norm_groups": 2},
        {"conv_width": 2, "conv_bias": False},
        {"z_gate": True, "z_bias": False},
        {"d_residual": True, "d_per_head": True},
        {"half_lives": (3, 3), "decay": "softplus"},
    ],
    ids=str,
)
def test_neighbours_of_what_is_refused_are_mixers(change):
    mixer = MixerConfig(**MIXER | change)
    assert {name: getattr(mixer, name) for name in change} == change
    assert mixer.normalize == (mixer.norm == "softmax")
    assert mixer.uses_step_size == ("dt_bias" in change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: 0}, f"{name}=0 must be an integer of at least 1")
            for name in ("vocab_size", "d_model", "num_layers", "num_heads", "head_dim", "num_kv_heads")
        ),
        ({"mlp_dim": -1}, "mlp_dim=-1 must be an integer of at least 0"),
        ({"d_model": 32.0}, "d_model=32.0 must be an integer of at least 1"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads=4 must be a multiple of num_kv_heads=8"),
        ({"mixers": (MixerConfig(**MIXER),) * 2}, "2 mixers given for num_layers=3: give one, or one each"),
        (
            {"head_dim": 7, "mixers": MixerConfig(score="exp", norm="softmax", rope=True)},
            "head_dim=7 must be even: rotary embeddings turn pairs",
        ),
        ({"norm_eps": 0.0}, "norm_eps=0.0 and rope_theta=10000.0 must be positive"),
        ({"output_norm_eps": 0.0}, "output_norm_eps=0.0 must be positive and finite, or None for norm_eps"),
        ({"rope_theta": -1.0}, "norm_eps=1e-05 and rope_theta=-1.0 must be positive"),
        ({"tie_embeddings": "yes"}, "tie_embeddings='yes' must be True or False"),
        ({"mixers": MixerConfig(**MIXER, qk_groups=3)}, "num_heads=4 must be a multiple of qk_groups=3"),
        (
            {"mixers": MixerConfig(score="squared", norm="output", norm_groups=3)},
            "num_heads=4 must be a multiple of norm_groups=3",
        ),
        (
            {"mixers": MixerConfig(**MIXER, qk_groups=2), "num_kv_heads": 2},
            "qk_groups=2 shares queries and keys between heads that have values of their own, and num_kv_heads=2",
        ),
    ],
    ids=str,
)
def test_model_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**MODEL | change)


def test_model_with_one_mixer_is_the_model_with_one_each():
    one, mixer = ModelConfig(**MODEL), MODEL["mixers"]
    each = ModelConfig(**MODEL | {"mixers": (mixer,) * 3})
    assert one.layer_mixers == each.layer_mixers == (mixer,) * 3
    assert one.layer_runs == each.layer_runs == ((mixer, 3),)


def test_runs_join_equal_neighbours_only():
    a, b = MixerConfig(**MIXER), MixerConfig(**MIXER, conv_width=2)
    same_as_a = MixerConfig(**MIXER)
    config = ModelConfig(**MODEL | {"num_layers": 6, "mixers": (a, same_as_a, b, a, b, b)})
    assert config.layer_runs == ((a, 2), (b, 1), (a, 1), (b, 2))


def test_kv_heads_default_to_heads():
    assert ModelConfig(**MODEL).kv_heads == 4
    assert ModelConfig(**MODEL, num_kv_heads=2).kv_heads == 2


def test_odd_heads_do_without_rotary_embeddings():
    assert ModelConfig(**MODEL | {"head_dim": 7}).head_dim == 7
    turned = MixerConfig(score="exp", norm="softmax", rope=True, qk_dim=8)
    assert ModelConfig(**MODEL | {"head_dim": 7, "mixers": turned}).head_dim == 7


def test_configurations_are_frozen_values():
    """Equal ones are interchangeable: they are static arguments of jitted functions."""
    assert hash(ModelConfig(**MODEL)) == hash(ModelConfig(**MODEL))
    assert ModelConfig(**MODEL) == ModelConfig(**MODEL)
    for config, name in ((ModelConfig(**MODEL), "d_model"), (MixerConfig(**MIXER), "score")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)
