"""`python -m train.convert import` of the authors' checkpoints: their logits, and what a workdir of them can do."""

import json
import re
import shutil
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors import numpy as safetensors
from support.exhaustive import EXHAUSTIVE, exhaustive

from train import generate, loop
from train.checkpoint import checkpoint_steps
from train.configuration import load_config
from train.convert import authors
from train.convert.command import main
from train.convert.tensors import Layers
from train.data.tokenizers import load_tokenizer
from train.errors import UserError
from train.main import main as train
from train.workdir import claim
from twomamba_jax import ModelConfig, init_cache, parse_pattern
from twomamba_jax.layers.execution import Execution
from twomamba_jax.layers.language_model import Block

GOLDEN = Path(__file__).parents[2] / "golden"
CHECKPOINT = GOLDEN / "authors_2mamba"
EXPECTED = np.load(CHECKPOINT / "expected.npz")


def unlike(found, expected):
    """The largest difference over the largest value."""
    return np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A workdir; tests that change it work on a copy."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import", str(CHECKPOINT), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the checkpoint, and a function that changes its tensors and its config.json."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, directory)

    def change(drop=(), config=None, **tensors):
        path = directory / "model.safetensors"
        kept = {key: value for key, value in safetensors.load_file(path).items() if key not in drop}
        safetensors.save_file(kept | tensors.pop("tensors", {}), path)
        described = json.loads((directory / "config.json").read_text()) | (config or {})
        (directory / "config.json").write_text(json.dumps(described))
        return directory

    return change


@pytest.fixture(scope="module")
def loaded(imported):
    return generate.load(imported, "best")


def test_logits_are_the_authors(loaded):
    """In float32, to 1e-5 of the largest."""
    model, params, _ = loaded
    assert unlike(jax.jit(model.apply)({"params": params}, EXPECTED["tokens"]), EXPECTED["logits"]) < 1e-5


@exhaustive("test_cache.py, in which a prefill and single steps are the full pass, and the test above")
def test_logits_are_the_authors_step_by_step(loaded):
    model, params, _ = loaded
    tokens, expected = EXPECTED["tokens"], EXPECTED["logits"]
    step = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    cache = init_cache(model.config, tokens.shape[0], tokens.shape[1])
    logits, cache = step(tokens[:, :29], cache)
    pieces = [logits]
    for position in range(29, tokens.shape[1]):
        logits, cache = step(tokens[:, position : position + 1], cache)
        pieces.append(logits)
    assert unlike(jnp.concatenate(pieces, axis=1), expected) < 1e-5


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def test_layer_and_its_input_gradient_are_the_authors(path):
    golden = np.load(path)
    config = ModelConfig(
        vocab_size=3,
        d_model=32,
        num_layers=1,
        num_heads=2,
        head_dim=16,
        mlp_dim=64,
        mixers=parse_pattern(authors.ATTENTION_TYPES[path.stem], 1),
        output_norm_eps=authors.OUTPUT_NORM_EPS,
    )
    tensors = authors.layer_tensors(Layers(config).of(0), config)
    assert {f"w:{key}" for key in tensors} == {key for key in golden if key.startswith("w:")}
    params = {}
    for key, tensor in tensors.items():
        for parameter, values in tensor.unpack(golden[f"w:{key}"]):
            params[parameter.path[1:]] = values
    params = flax.traverse_util.unflatten_dict(params)
    block = Block(config=config, mixer=config.layer_mixers[0], execution=Execution())

    def layer(x):
        return block.apply({"params": params}, x, None, 0, None, None, None, None)[0]

    def both(x, gy):
        y, pull = jax.vjp(layer, x)
        return y, *pull(gy)

    y, gx = jax.jit(both)(golden["x"], golden["gy"])
    assert unlike(y, golden["y"]) < 3e-6
    assert unlike(gx, golden["gx"]) < 1e-5


@exhaustive("test_logits_are_the_authors, and tests/train/test_generate.py, which continues a run like this")
def test_generate_continues_it(imported, loaded, capsys):
    """A checkpoint without a tokenizer takes tokens as numbers; greedily, each is the likeliest."""
    capsys.readouterr()
    options = ["--temperature", "0", "--max_new_tokens", "3", "--fold_size", "4"]
    assert generate.main(["--workdir", str(imported), "--prompt", "5 17 3", *options]) == 0
    printed = capsys.readouterr()
    words = printed.out.split()
    assert "3 tokens, too few tokens for a speed; cache" in printed.err
    model, params, tokenizer = loaded
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    tokens = [1, 5, 17, 3, *map(int, words)]
    assert len(tokens) == 7
    padded = np.zeros_like(EXPECTED["tokens"])  # so that the program is that of the logits above
    padded[0, :7] = tokens
    logits = jax.jit(model.apply)({"params": params}, padded)
    assert jnp.argmax(logits[0, 3:6], axis=-1).tolist() == tokens[4:]


@exhaustive("test_export_and_import_are_the_same_run, and runs that resume from a checkpoint")
def test_training_goes_on_from_it(imported, tmp_path, capsys, monkeypatch):
    """With a fresh optimiser, from step 0; the workdir is then a run like any other, and resumes."""
    monkeypatch.setattr(loop, "sample_text", lambda *_: "")
    workdir = tmp_path / "run"
    shutil.copytree(imported, workdir)
    (tmp_path / "text.txt").write_text("".join(f"{n % 80} {n * n % 80}\n" for n in range(2000)))
    values = {
        "data.source": "files", "data.paths": tmp_path / "text.txt", "data.cache_dir": tmp_path / "tokens",
        "sample.tokens": 4, "optimizer.learning_rate": "1e-3", "optimizer.warmup_steps": 1,
        "optimizer.decay_steps": 10, "optimizer.schedule": "linear", "length": 32, "batch_size": 4, "eval_rows": 4,
        "eval_every": 2, "checkpoint_every": 1, "log_every": 1, "execution.remat": "none",
    }  # fmt: skip

    def run(steps):
        overrides = [f"--config.{key}={value}" for key, value in (values | {"steps": steps}).items()]
        return train(["--config", str(workdir / "config.py"), "--workdir", str(workdir), *overrides])

    assert run(1) == 0
    assert "step 0 of 1" in capsys.readouterr().out
    assert checkpoint_steps(workdir / "checkpoints") == [0, 1]
    record = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(record["train/loss"])
    assert "imported" not in json.loads((workdir / "corpus.json").read_text())
    assert run(2) == 0
    assert "step 1 of 2" in capsys.readouterr().out


def test_another_model_or_tokenizer_does_not_take_its_workdir(imported):
    config = load_config(str(imported / "config.py"))
    for key, value, message in (
        ("num_layers", 1, "model.num_layers is 2 there and 1 here"),
        ("norm_eps", 1e-6, "model.norm_eps is 1e-05 there and 1e-06 here"),
    ):
        other = config.copy_and_resolve_references()
        other.model[key] = value
        with pytest.raises(UserError, match=re.escape(message)):
            claim(imported, other, {"digest": "x", "tokenizer": "ids:80:2:1"})
    with pytest.raises(UserError, match="was trained on another tokenizer: its digest is ids:80:2:1, this"):
        claim(imported, config, {"digest": "x", "tokenizer": "bytes"})


@pytest.mark.parametrize("dtype", [np.float16, bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_half_precision_becomes_float32(dtype, checkpoint, tmp_path, capsys):
    tensors = safetensors.load_file(CHECKPOINT / "model.safetensors")
    halves = {key: value.astype(dtype) for key, value in tensors.items() if value.dtype == np.float32}
    directory = checkpoint(tensors=halves)
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    assert "there and float32 here" in capsys.readouterr().out
    _, params, _ = generate.load(tmp_path / "run", "best")
    expected = halves["lm_head.weight"].T.astype(np.float32)
    assert params["head"].dtype == np.float32
    assert np.asarray(params["head"]).tobytes() == np.ascontiguousarray(expected).tobytes()


def test_shards_are_read(imported, checkpoint, tmp_path):
    directory = checkpoint()
    tensors = safetensors.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    where = {}
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        safetensors.save_file({key: tensors[key] for key in keys}, directory / name)
        where |= dict.fromkeys(keys, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    whole, sharded = (generate.load(workdir, "best")[1] for workdir in (imported, tmp_path / "run"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, sharded))


def test_tokenizer_comes_along(checkpoint, tmp_path, capsys):
    """The special tokens are those of config.json, by the names that the tokenizer has for them."""
    import tokenizers

    vocabulary = {name: number for number, name in enumerate(["<unk>", "<start>", "<end>", *"abcdefghij"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    directory = checkpoint()
    tokenizer.save(str(directory / "tokenizer.json"))
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    _, _, kept = generate.load(tmp_path / "run", "best")
    assert (kept.bos_id, kept.eos_id, kept.encode("aj").tolist()) == (1, 2, [3, 12])


def test_softmax_checkpoint_with_its_frequencies_is_read(tmp_path, softmax_checkpoint):
    directory = softmax_checkpoint()
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    model, params, _ = generate.load(tmp_path / "run", "best")
    assert model.config.layer_mixers[0].rope
    fused = safetensors.load_file(directory / "model.safetensors")["model.layers.1.self_attn.qkv_proj.weight"]
    for number, name in enumerate("qkv"):
        kernel = np.asarray(params["layers_0"]["mixer"][name]["kernel"][1])
        np.testing.assert_array_equal(kernel.reshape(32, 32).T, fused[32 * number : 32 * number + 32])


def test_a_prompt_longer_than_a_key_value_cache(tmp_path, softmax_checkpoint, capsys):
    assert main(["import", str(softmax_checkpoint()), "--workdir", str(tmp_path / "run")]) == 0
    options = ["--workdir", str(tmp_path / "run"), "--prompt", "7 8 9 10 11", "--max_new_tokens", "8"]
    capsys.readouterr()
    assert generate.main([*options, "--max_length", "10"]) == 2
    error = capsys.readouterr().err
    assert "the prompt's 6 tokens and --max_new_tokens=8 do not fit into key/value caches of --max_length=10" in error
    if EXHAUSTIVE:  # it would be compiled
        assert generate.main([*options, "--max_length", "14"]) == 0
        assert capsys.readouterr().out


@pytest.fixture
def softmax_checkpoint(checkpoint):
    """The checkpoint as one of softmax attention, with these frequencies."""

    def make(frequencies=None, **config):
        expected = 10000.0 ** (-np.arange(0, 16, 2) / 16)
        frequencies = np.asarray(expected if frequencies is None else frequencies, np.float32)
        names = ("conv1d.weight", "conv1d.bias", "A_mask_proj.weight", "attn_mask")
        drop = [f"model.layers.{number}.self_attn.{name}" for number in (0, 1) for name in names]
        keys = [f"model.layers.{number}.self_attn.rotary_emb.freqs" for number in (0, 1)]
        return checkpoint(drop, {"attention_type": "softmax"} | config, tensors=dict.fromkeys(keys, frequencies))

    return make


def refused(directory, capsys, *options):
    """The line with which the import ends; nothing is written."""
    workdir = directory.parent / "refused"
    capsys.readouterr()
    assert main(["import", str(directory), "--workdir", str(workdir), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not workdir.exists()
    return line


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"attention_type": "squared__sm_norm"}, "unknown attention_type 'squared__sm_norm'; "),
        ({"vocab_size": "80"}, "vocab_size='80' must be an integer"),
        ({"attention_type": "mamba"}, "attention_type='mamba' is the authors' baseline (mamba_layer.*)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, expected False"),
        ({"attention_bias": True}, "attention_bias=True, expected False"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'}, expected None"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1, expected num_attention_heads=2"),
        ({"hidden_size": 48}, "hidden_size=48, expected num_attention_heads * head_dim = 32"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "expected num_attention_heads * head_dim = 48"),
        ({"vocab_size": 81}, "model.embed_tokens.weight has shape [80, 32], expected [81, 32] by config.json"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight, model.layers.2.post_attention"),
        ({"num_hidden_layers": 1}, "has model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight"),
        (
            {"attention_type": "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2__dt_on_values"},
            "lacks model.layers.0.self_attn.dt_proj.weight, model.layers.1.self_attn.dt_proj.weight: expected",
        ),
        (
            {"attention_type": "linear__output_norm__A_mask_type_neg_softplus"},
            "lacks model.layers.0.self_attn.out_norm.weight",
        ),
        ({"eos_token_id": "two"}, "eos_token_id='two', expected the number of a token"),
        ({"eos_token_id": 80}, "takes numbers from 0 to 79"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_refused(config, line, checkpoint, capsys):
    assert line in refused(checkpoint(config=config), capsys)


def test_plain_llama_is_refused(checkpoint, capsys):
    directory = checkpoint()
    described = json.loads((directory / "config.json").read_text())
    del described["attention_type"]
    (directory / "config.json").write_text(json.dumps(described))
    assert "has no attention_type, so it is not of the paper's authors" in refused(directory, capsys)
    del described["hidden_size"]
    (directory / "config.json").write_text(json.dumps(described | {"attention_type": "linear"}))
    assert "lacks hidden_size: expected the config.json of save_pretrained" in refused(directory, capsys)
    (directory / "config.json").write_text("[")
    assert "config.json is not readable JSON" in refused(directory, capsys)
    (directory / "config.json").unlink()
    assert "config.json is missing: give the directory that save_pretrained wrote" in refused(directory, capsys)


def test_frequencies_that_are_not_thetas_are_refused(softmax_checkpoint, capsys):
    scaled = 10000.0 ** (-np.arange(0, 16, 2) / 16) / 2
    assert "self_attn.rotary_emb.freqs is not rope_theta^(-2 i / K) with rope_theta=10000.0" in refused(
        softmax_checkpoint(scaled), capsys
    )


def test_other_theta_and_no_frequencies_are_refused(softmax_checkpoint, checkpoint, capsys):
    assert "with rope_theta=500000.0" in refused(softmax_checkpoint(rope_theta=500000.0), capsys)
    directory = checkpoint(["model.layers.1.self_attn.rotary_emb.freqs"], {"rope_theta": 10000.0})
    assert "lacks model.layers.1.self_attn.rotary_emb.freqs" in refused(directory, capsys)


def test_tensors_of_other_kinds_are_refused(checkpoint, capsys):
    directory = checkpoint(tensors={"lm_head.weight": np.zeros((80, 32), np.int32)})
    assert "lm_head.weight is I32, expected one of float32, bfloat16, float16" in refused(directory, capsys)
    directory = checkpoint(tensors={"lm_head.weight": np.zeros((80, 32), np.float64)})
    assert "lm_head.weight is F64" in refused(directory, capsys)


def test_mamba_layers_and_other_leftovers_are_refused(checkpoint, capsys):
    directory = checkpoint(tensors={"model.layers.0.self_attn.mamba_layer.A_log": np.zeros(2, np.float32)})
    assert "the checkpoint has model.layers.0.self_attn.mamba_layer.A_log, which the model of its" in refused(
        directory, capsys
    )


def test_damaged_files_are_refused(checkpoint, capsys):
    directory = checkpoint()
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-10])
    assert "model.safetensors cannot be read (" in refused(directory, capsys)
    (directory / "model.safetensors").unlink()
    assert "has no tensors: expected model.safetensors, model.safetensors.index.json or" in refused(directory, capsys)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "one.safetensors"}}))
    assert "one.safetensors is missing: fetch the directory again" in refused(directory, capsys)
    (directory / "one.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"lm_head.wait": "one.safetensors"}}))
    assert "says that lm_head.wait is in one.safetensors, and it is not there" in refused(directory, capsys)
    index.write_text("{}")
    assert "is no index with a weight_map" in refused(directory, capsys)


def test_pickle_without_torch_is_refused(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    directory = checkpoint()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "is a pickle, which only PyTorch reads (" in refused(directory, capsys)


def test_pickle_is_read_as_weights_alone(imported, checkpoint, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    directory = checkpoint()
    tensors = safetensors.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    whole, pickled = (generate.load(workdir, "best")[1] for workdir in (imported, tmp_path / "run"))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, pickled))

    class Code:
        def __reduce__(self):
            return print, ("it ran",)

    torch.save({"lm_head.weight": Code()}, path)
    assert "cannot be read as weights alone (UnpicklingError): expected tensors by name and" in refused(
        directory, capsys
    )
    assert "it ran" not in capsys.readouterr().out


def test_workdir_that_is_not_empty_is_refused(checkpoint, capsys, tmp_path):
    assert main(["import", str(checkpoint()), "--workdir", str(tmp_path)]) == 2
    assert "is not empty: choose another, or remove it" in capsys.readouterr().err


def test_tokenizer_with_more_tokens_is_refused(checkpoint, capsys):
    assert "'bytes' has 257 tokens, expected at most vocab_size=80" in refused(
        checkpoint(), capsys, "--tokenizer", "bytes"
    )


def test_numbers_are_tokens():
    tokenizer = load_tokenizer("ids:20", "2", "1")
    assert tokenizer.encode(" 5 17\n3").tolist() == [5, 17, 3]
    assert tokenizer.decode([1, 5, 17, 2]) == "5 17"
    assert (load_tokenizer("ids:20").eos_id, load_tokenizer("ids:20").bos_id) == (19, None)
    for make, message in (
        (
            lambda: tokenizer.encode("5 20"),
            "a document's token is '20': data.tokenizer='ids:20' takes numbers from 0 to 19",
        ),
        (lambda: load_tokenizer("ids:x"), "data.tokenizer='ids:x' must be 'ids:N', N the number of tokens"),
        (lambda: load_tokenizer("ids:9", "</s>"), "data.eos_token is '</s>': data.tokenizer='ids:9' takes numbers"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            make()


def test_wrong_command_line_is_one_line(capsys):
    for arguments in ([], ["import"], ["import", "x"], ["melt"]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert line.endswith("; see --help")


def test_run_of_before_newer_keys_resumes(tmp_path):
    """A key that config.json does not have is None or False; any other value is another run."""
    workdir, config = tmp_path / "run", load_config(str(Path(__file__).parents[3] / "configs" / "2mamba.py"))
    claim(workdir, config, {"digest": "x"})
    saved = json.loads((workdir / "config.json").read_text())
    del saved["model"]["output_norm_eps"], saved["model"]["tie_embeddings"]
    (workdir / "config.json").write_text(json.dumps(saved))
    claim(workdir, config, {"digest": "x"})
    (workdir / "config.json").write_text(json.dumps(saved))
    config.model.output_norm_eps = 1e-6
    with pytest.raises(UserError, match=r"model.output_norm_eps is 'absent' there and 1e-06 here"):
        claim(workdir, config, {"digest": "x"})
    config.model.output_norm_eps, config.model.tie_embeddings = None, True
    with pytest.raises(UserError, match=r"model.tie_embeddings is 'absent' there and True here"):
        claim(workdir, config, {"digest": "x"})
