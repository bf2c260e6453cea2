"""`python -m train.convert export`, and the way back: the same model, the same bits."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from support.exhaustive import EXHAUSTIVE

from train import generate
from train.convert import authors, own
from train.convert.command import main
from train.convert.parameters import check_tensors, read_parameters
from train.convert.reading import SafetensorsFiles
from train.convert.writing import Output, write_tensors
from train.errors import UserError
from train.restore import parameter_shapes
from twomamba_jax import LanguageModel, ModelConfig, parse_pattern

CHECKPOINT = Path(__file__).parents[2] / "golden" / "authors_2mamba"
SIZES = {"vocab_size": 7, "d_model": 12, "num_heads": 2, "head_dim": 6, "mlp_dim": 10}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import", str(CHECKPOINT), "--workdir", str(workdir)]) == 0
    return workdir


def model_of(pattern, num_layers=2, **sizes):
    return ModelConfig(mixers=parse_pattern(pattern, num_layers), num_layers=num_layers, **SIZES | sizes)


def random_tree(model):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), parameter_shapes(LanguageModel(model))
    )


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_authors_layout_gives_their_file_back(imported, tmp_path):
    """Each tensor bit for bit, masks included, and config.json but for what their code does not read."""
    assert main(["export", "--workdir", str(imported), "--out", str(tmp_path / "out"), "--layout", "authors"]) == 0
    found, expected = (
        safetensors.load_file(directory / "model.safetensors") for directory in (tmp_path / "out", CHECKPOINT)
    )
    assert found.keys() == expected.keys()
    for key in expected:
        assert (found[key].dtype, found[key].shape) == (expected[key].dtype, expected[key].shape)
        assert found[key].tobytes() == expected[key].tobytes(), key
    there, here = (json.loads((one / "config.json").read_text()) for one in (CHECKPOINT, tmp_path / "out"))
    assert there.keys() - here.keys() == {"transformers_version"}
    assert {key: here[key] for key in there.keys() & here.keys()} == {
        key: value for key, value in there.items() if key in here
    }


@pytest.mark.parametrize("layout", ["own", "authors"])
def test_import_of_an_export_is_the_same_run(layout, imported, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["export", "--workdir", str(imported), "--out", str(out), "--layout", layout]) == 0
    assert main(["import", str(out), "--workdir", str(again)]) == 0
    (model, params, tokenizer), (other, same, kept) = (generate.load(one, "best") for one in (imported, again))
    assert other == model
    assert_same_bits(same, params)
    assert kept.digest == tokenizer.digest


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        ("softmax,2mamba-dt-long,softmax", {"num_kv_heads": 1}),
        *([("mamba2,2mamba*", {}), ("2mamba-dt-long-k16", {"mlp_dim": 0, "head_dim": 4})] if EXHAUSTIVE else []),
    ],
    ids=str,
)
def test_own_layout_has_every_parameter(pattern, sizes, tmp_path):
    """Through a file in three shards and more."""
    model = model_of(pattern, 3, **sizes)
    tree, tensors = random_tree(model), own.tensors(model)
    outputs = {key: Output("F32", one.shape, lambda one=one: one.pack(tree)) for key, one in tensors.items()}
    write_tensors(tmp_path, outputs, shard_bytes=4096)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    files = SafetensorsFiles(tmp_path)
    check_tensors(files, tensors, lambda _: False)
    assert_same_bits(read_parameters(files, tensors, parameter_shapes(LanguageModel(model))), tree)
    described = json.loads(json.dumps(own.describe(pattern, model, 32, {})))
    assert own.read_model(described, "config.json") == (pattern, model)


OTHERS = ["softmax", "d-residual", "decay-original"] if EXHAUSTIVE else []


@pytest.mark.parametrize("variant", ["conv3-silu", "mamba2s-z-gate", *OTHERS])
def test_authors_layout_has_every_parameter(variant):
    model = dataclasses.replace(model_of(variant), output_norm_eps=authors.OUTPUT_NORM_EPS)
    tree, tensors = random_tree(model), authors.tensors(model)
    found = jax.tree.map(np.zeros_like, tree)
    for tensor in tensors.values():
        for parameter, values in tensor.unpack(tensor.pack(tree)):
            assert not parameter.of(found).any()
            parameter.of(found)[...] = values
    assert_same_bits(found, tree)
    described = authors.describe(model, 32, 1, 2)
    assert authors.ATTENTION_TYPES[described["attention_type"]] == variant
    assert authors.read_model(described, "config.json") == (variant, model)


@pytest.mark.parametrize(
    ("pattern", "sizes", "line"),
    [
        ("softmax,2mamba", {}, "one mixer for all layers, and this model has several: use --layout own"),
        ("2mamba-long", {}, "no attention_type for this model's mixer: use --layout own"),
        ("2mamba", {"num_kv_heads": 1}, "as many key/value heads as heads, 2, and this model has 1"),
        ("2mamba", {"mlp_dim": 0}, "num_heads * head_dim = d_model and an MLP, and this model has num_heads=2"),
    ],
    ids=str,
)
def test_model_that_the_authors_do_not_have_is_refused(pattern, sizes, line):
    with pytest.raises(UserError) as error:
        authors.describe(model_of(pattern, **sizes), 32, None, None)
    assert line in str(error.value)


def test_variant_that_became_another_mixer_is_refused():
    model = model_of("2mamba")
    described = own.describe("2mamba", model, 32, {})
    described["mixers"][0]["mixer"]["conv_width"] = 3
    with pytest.raises(UserError, match="variant '2mamba' is another mixer in layer 0: conv_width=3 there and 2 here"):
        own.read_model(described, "config.json")
    with pytest.raises(UserError, match=r"config.json is of version 2 of this layout, expected 1"):
        own.read_model(described | {"version": 2}, "config.json")
    with pytest.raises(UserError, match=r"config.json describes no model \(KeyError: 'variant'\)"):
        own.read_model({"version": 1}, "config.json")


def test_model_card_says_what_it_is(imported, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(imported, workdir)
    corpus = {"digest": "0123", "tokenizer": "ids:80:2:1"}
    (workdir / "corpus.json").write_text(json.dumps(corpus))
    records = [{"step": 0, "eval/loss": 2.5, "eval/accuracy": 0.25}, {"step": 4, "eval/loss": 1.0}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["export", "--workdir", str(workdir), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("variant `2mamba`", "| parameters | 26,464 |", "digest `0123`", "| eval/loss | 2.5 |"):
        assert line in card


def test_export_refuses_a_full_directory_and_no_run(imported, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["export", "--workdir", str(imported), "--out", str(tmp_path / "full")]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "it has no config.json" in capsys.readouterr().err
