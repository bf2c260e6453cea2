"""The table of variants against the paper's, and the one-line patterns of layers."""

import dataclasses
import re

import pytest

from twomamba_jax import VARIANTS, MixerConfig, parse_pattern
from twomamba_jax.variants import entry_of

pytestmark = pytest.mark.quick

# Rows of Tables 1 to 3 and Figures 2 to 5: test loss, the row that it is a change of, and the change.
ABLATIONS = {
    "output-norm-relu": (3.06, "output-norm", {"activation": "relu"}),
    "conv2": (2.93, "output-norm", {"conv_width": 2}),
    "conv3": (2.91, "output-norm", {"conv_width": 3}),
    "conv4": (2.90, "output-norm", {"conv_width": 4}),
    "conv2-silu": (2.90, "conv2", {"activation": "silu"}),
    "conv3-silu": (2.89, "conv3", {"activation": "silu"}),
    "conv4-silu": (2.89, "conv4", {"activation": "silu"}),
    "d-residual": (3.11, "output-norm", {"d_residual": True}),
    "z-gate": (3.13, "output-norm", {"z_gate": True}),
    "value-dt": (3.06, "output-norm", {"discretize_values": True}),
    "decay-original": (2.98, "output-norm", {"decay": "discretized"}),
    "decay-softplus": (2.88, "output-norm", {"decay": "softplus"}),
    "conv2-decay-original": (2.80, "conv2", {"decay": "discretized"}),
    "conv2-decay-softplus": (2.77, "conv2", {"decay": "softplus"}),
    "mamba2s": (2.76, "conv2-decay-softplus", {"discretize_values": True}),
    "mamba2s-silu": (2.76, "mamba2s", {"activation": "silu"}),
    "mamba2s-d-residual": (2.76, "mamba2s", {"d_residual": True}),
    "mamba2s-z-gate": (2.78, "mamba2s", {"z_gate": True}),
    "2mamba": (2.62, "mamba2s", {"score": "squared", "norm": "softmax", "discretize_values": False}),
    "2mamba-e": (2.59, "2mamba", {"score": "exp"}),
    "2mamba-dt": (2.73, "2mamba", {"discretize_values": True}),
    "2mamba-e-dt": (None, "2mamba-e", {"discretize_values": True}),
    "squared-output-norm": (None, "mamba2s", {"score": "squared"}),
    "memoryless": (None, "2mamba", {"decay": "memoryless"}),
    "2mamba-long": (None, "2mamba", {"half_lives": (1.0, 1024.0)}),
    "2mamba-dt-long": (None, "2mamba-long", {"discretize_values": True}),
    "2mamba-e-long": (None, "2mamba-long", {"score": "exp"}),
    "2mamba-dt-long-norm": (None, "2mamba-dt-long", {"normalize_keys": True}),
    "2mamba-dt-long-k16": (None, "2mamba-dt-long", {"qk_dim": 16}),
    "2mamba-dt-long-k32": (None, "2mamba-dt-long", {"qk_dim": 32}),
    "2mamba-dt-long-k128": (None, "2mamba-dt-long", {"qk_dim": 128}),
    "mamba2-released": (None, "mamba2", {"qk_dim": 128, "qk_groups": 1, "d_per_head": True, "z_bias": False}),
    "softmax-conv2": (None, "softmax", {"conv_width": 2}),
}

# The others, written out. `linear` and `softmax` share nothing with the output norm's family.
WHOLE = {
    "output-norm": (3.13, MixerConfig(score="linear", norm="output")),
    "linear": (3.03, MixerConfig(score="linear", norm="softmax", activation="relu")),
    "softmax": (2.73, MixerConfig(score="exp", norm="softmax", rope=True)),
    "mamba2": (
        None,
        MixerConfig(
            score="linear", norm="output", activation="silu", activation_on="qkv", conv_width=4, decay="discretized",
            discretize_values=True, dt_bias=True, d_residual=True, z_gate=True, scale=1.0,
        ),
    ),
}  # fmt: skip


def test_every_variant_is_in_one_of_the_tables():
    assert ABLATIONS.keys() | WHOLE.keys() == VARIANTS.keys()
    assert not ABLATIONS.keys() & WHOLE.keys()


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(name):
    loss, base, change = ABLATIONS[name]
    assert VARIANTS[name].paper_loss == loss
    assert VARIANTS[name].mixer == dataclasses.replace(VARIANTS[base].mixer, **change)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_model(name):
    assert (VARIANTS[name].paper_loss, VARIANTS[name].mixer) == WHOLE[name]


def test_no_two_variants_are_the_same():
    assert len({variant.mixer for variant in VARIANTS.values()}) == len(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_says_where_it_is_from(name):
    """A figure of the paper comes with its table or figure; what has none says so, or names its algorithm."""
    variant = VARIANTS[name]
    if variant.paper_loss is None:
        assert any(words in variant.source for words in ("no figure", "it has none", "not the paper's"))
    else:
        assert "Table" in variant.source or "Figure" in variant.source


SOFTMAX, SQUARED, LINEAR = (VARIANTS[name].mixer for name in ("softmax", "2mamba", "linear"))
NARROW = dataclasses.replace(SQUARED, qk_dim=32)


@pytest.mark.parametrize(
    ("pattern", "mixers"),
    [
        ("2mamba", [SQUARED] * 5),
        ("2mamba*", [SQUARED] * 5),
        ("2mamba*5", [SQUARED] * 5),
        ("softmax,2mamba*,softmax", [SOFTMAX, SQUARED, SQUARED, SQUARED, SOFTMAX]),
        ("2mamba*,softmax*2", [SQUARED, SQUARED, SQUARED, SOFTMAX, SOFTMAX]),
        (" softmax , 2mamba *3,linear ", [SOFTMAX, SQUARED, SQUARED, SQUARED, LINEAR]),
        ("softmax,2mamba,softmax,2mamba,softmax", [SOFTMAX, SQUARED, SOFTMAX, SQUARED, SOFTMAX]),
        ("softmax * 4, 2mamba *", [SOFTMAX] * 4 + [SQUARED]),
        ("2mamba(qk_dim=32)", [NARROW] * 5),
        ("2mamba( qk_dim = 32 ) *", [NARROW] * 5),
        ("softmax,2mamba(qk_dim=32)*3,2mamba", [SOFTMAX, NARROW, NARROW, NARROW, SQUARED]),
        (
            "2mamba(half_lives=(2, 8), conv_width=3)",
            [dataclasses.replace(SQUARED, half_lives=(2, 8), conv_width=3)] * 5,
        ),
    ],
)
def test_pattern(pattern, mixers):
    assert parse_pattern(pattern, 5) == tuple(mixers)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2manba", "unknown variant '2manba': did you mean '2mamba'? All: softmax, linear, mamba2, "),
        ("softmax,mamba2x*", "unknown variant 'mamba2x': did you mean 'mamba2'?"),
        ("", "unknown variant ''"),
        ("softmax,,softmax", "unknown variant ''"),
        ("softmax**,2mamba", "pattern 'softmax**,2mamba': 'softmax**' is no entry; expected name, name*COUNT or name*"),
        ("2mamba*x", "pattern '2mamba*x': '2mamba*x' is no entry"),
        ("2mamba*-1", "pattern '2mamba*-1': '2mamba*-1' is no entry"),
        ("softmax*,2mamba*", "pattern 'softmax*,2mamba*' has 2 entries that end in '*': at most one"),
        ("softmax,2mamba", "pattern 'softmax,2mamba' names 2 layers, but the model has 5"),
        ("softmax*6", "pattern 'softmax*6' names 6 layers, but the model has 5"),
        ("softmax*5,2mamba*", "pattern 'softmax*5,2mamba*' names at least 6 layers, but the model has 5"),
        ("2mamba*1", "pattern '2mamba*1' names 1 layers, but the model has 5"),
        ("2mamba*0,softmax", "'2mamba*0' is no entry"),
        (
            "2mamba(qk_dim=32",
            "'2mamba(qk_dim=32' is no entry; expected name, name*COUNT or name*, or name(field=value, .",
        ),
        ("2mamba(qk_dims=32)", "'2mamba(qk_dims=32)': unknown field 'qk_dims': did you mean 'qk_dim'?"),
        ("2mamba()", "'2mamba()': expected field=value, ... with numbers, 'texts', True, False or None"),
        ("2mamba(32)", "'2mamba(32)': expected field=value"),
        ("2mamba(qk_dim=x)", "'2mamba(qk_dim=x)': expected field=value"),
        ("2mamba(qk_dim=2)(qk_dim=3)", "'2mamba(qk_dim=2)(qk_dim=3)': expected field=value"),
        ("2mamba(qk_dim=2)+(3)", "'2mamba(qk_dim=2)+(3)': expected field=value"),
        ("2mamba(qk_dim=2, qk_dim=3)", "'2mamba(qk_dim=2, qk_dim=3)': expected field=value"),
        ("2mamba(**{})", "'2mamba(**{})': unknown field 'None': did you mean"),
        ("2mamba(conv_width=7)", "'2mamba(conv_width=7)': conv_width=7 must be 1 (no convolution), 2, 3 or 4"),
        ("2mamba(half_lives=3)", "'2mamba(half_lives=3)': "),
    ],
)
def test_pattern_that_does_not_fit_is_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_pattern(pattern, 5)


@pytest.mark.parametrize("changes", [{}, {"qk_dim": 16, "half_lives": (2.0, 8.0), "score": "exp"}], ids=str)
def test_entry_of_a_mixer_is_parsed_back(changes):
    mixer = dataclasses.replace(SQUARED, **changes)
    entry = entry_of("2mamba", mixer)
    assert (entry == "2mamba") == (not changes)
    assert parse_pattern(f"softmax,{entry}*2", 3) == (SOFTMAX, mixer, mixer)
