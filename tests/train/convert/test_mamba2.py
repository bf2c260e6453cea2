"""`python -m train.convert import` of Mamba-2 as released, in the layouts of Hugging Face and of state-spaces/mamba."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors
from support.exhaustive import exhaustive

from train import generate
from train.checkpoint import checkpoint_steps
from train.convert import mamba2
from train.convert.command import main
from train.cross_entropy import cross_entropy
from train.main import main as train
from train.restore import parameter_shapes
from twomamba_jax import LanguageModel, fork, head_kernel, init_cache, parse_pattern, prefill, roll_back

CHECKPOINT = Path(__file__).parents[2] / "golden" / "mamba2_hf"
EXPECTED = np.load(CHECKPOINT / "expected.npz")
TOKENS = EXPECTED["tokens"]

# What state-spaces/mamba writes for the same model; its vocabulary is filled up to a multiple of 16, 96.
STATE_SPACES = {
    "d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 90,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 32, "headdim": 16}, "attn_layer_idx": [], "attn_cfg": {},
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}  # fmt: skip


def unlike(found, expected):
    """The largest difference over the largest value."""
    return np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected))


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A workdir; tests that change it work on a copy."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import", str(CHECKPOINT), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def loaded(imported):
    return generate.load(imported, "best")


def released_tensors():
    """The checkpoint under state-spaces' names: one of them differs, and the tied head is there twice."""
    tensors = safetensors.load_file(CHECKPOINT / "model.safetensors")
    embedding = tensors.pop("backbone.embeddings.weight")
    return tensors | {"backbone.embedding.weight": embedding, "lm_head.weight": embedding.copy()}


def write_checkpoint(directory, config, tensors):
    directory.mkdir()
    safetensors.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def hugging_face(tmp_path):
    """A function that writes the checkpoint with other values of config.json, or without some."""

    def write(config=None, drop=()):
        described = json.loads((CHECKPOINT / "config.json").read_text()) | (config or {})
        described = {key: value for key, value in described.items() if key not in drop}
        tensors = safetensors.load_file(CHECKPOINT / "model.safetensors")
        return write_checkpoint(tmp_path / "checkpoint", described, tensors)

    return write


@pytest.fixture
def state_spaces(tmp_path):
    """The same in state-spaces' layout; `ssm_cfg` are other values of that key, and `tensors` other tensors."""

    def write(config=None, ssm_cfg=None, tensors=None):
        described = STATE_SPACES | {"ssm_cfg": STATE_SPACES["ssm_cfg"] | (ssm_cfg or {})} | (config or {})
        return write_checkpoint(tmp_path / "checkpoint", described, released_tensors() | (tensors or {}))

    return write


def test_logits_and_gradients_are_hugging_faces(loaded):
    """In float32, to 1e-5 of the largest; the gradient by each of its weights, of the embedding as both that it is."""
    model, params, _ = loaded

    def loss(params):
        x = model.apply({"params": params}, TOKENS, apply_head=False)
        sums = cross_entropy(x[:, :-1], head_kernel(params), TOKENS[:, 1:], jnp.ones(TOKENS[:, 1:].shape))
        return sums.loss / sums.weight, x @ head_kernel(params)

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert unlike(logits, EXPECTED["logits"]) < 1e-5
    assert float(value) == pytest.approx(float(EXPECTED["loss"]), rel=1e-6)
    tensors = mamba2.HUGGING_FACE.tensors(model.config)
    assert {f"g:{key}" for key in tensors} == {key for key in EXPECTED if key.startswith("g:")}
    for key, tensor in tensors.items():
        assert unlike(tensor.pack(gradients), EXPECTED[f"g:{key}"]) < 1e-5, key


@exhaustive("test_cache.py, in which this mixer's steps are its full pass, and the test above")
def test_logits_are_hugging_faces_step_by_step(loaded):
    """A prefill and single steps; then the last seven tokens are taken back and read again in the same bits."""
    model, params, _ = loaded
    step = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache))

    def steps(cache, start):
        pieces = []
        for position in range(start, TOKENS.shape[1]):
            logits, cache = step(TOKENS[:, position : position + 1], cache)
            pieces.append(logits)
        return jnp.concatenate(pieces, axis=1), cache

    first, cache = step(TOKENS[:, :29], init_cache(model.config, *TOKENS.shape, rollback=True))
    rest, cache = steps(cache, 29)
    assert unlike(jnp.concatenate([first, rest], axis=1), EXPECTED["logits"]) < 1e-5
    again, _ = steps(roll_back(cache, 7), TOKENS.shape[1] - 7)
    np.testing.assert_array_equal(again, rest[:, -7:])


@exhaustive("test_generate.py: several samples are forks of a prompt")
def test_forks_of_a_prompt_go_on_alone(loaded):
    """Three rows from one prompt, each with a token of its own behind it."""
    model, params, _ = loaded
    prompt, new = TOKENS[:1, :20], jnp.array([[3], [4], [5]])
    state = fork(prefill(model, params, prompt, init_cache(model.config, 1, 24)), 3)
    logits, _ = jax.jit(model.apply)({"params": params}, new, cache=state.cache)
    whole = jnp.concatenate([jnp.tile(prompt, (3, 1)), new], axis=1)
    assert unlike(logits[:, 0], np.asarray(jax.jit(model.apply)({"params": params}, whole))[:, -1]) < 1e-5


@exhaustive("the logits above, and tests/train/test_generate.py, which continues a run like this")
def test_generate_continues_it(imported, loaded, capsys):
    """Greedily, each token is the likeliest; the prompt follows config.json's bos."""
    capsys.readouterr()
    options = ["--temperature", "0", "--max_new_tokens", "3", "--fold_size", "4"]
    assert generate.main(["--workdir", str(imported), "--prompt", "5 17 3", *options]) == 0
    model, params, tokenizer = loaded
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 2)
    tokens = [0, 5, 17, 3, *map(int, capsys.readouterr().out.split())]
    assert len(tokens) == 7
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray([tokens]))
    assert jnp.argmax(logits[0, 3:-1], axis=-1).tolist() == tokens[4:]


def test_export_and_import_are_the_same_run(imported, loaded, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["export", "--workdir", str(imported), "--out", str(out)]) == 0
    assert "head" not in safetensors.load_file(out / "model.safetensors")
    assert main(["import", str(out), "--workdir", str(again)]) == 0
    (model, params, _), (other, same, _) = loaded, generate.load(again, "best")
    assert other == model
    assert_same_bits(same, params)
    capsys.readouterr()
    assert main(["export", "--workdir", str(imported), "--out", str(tmp_path / "x"), "--layout", "authors"]) == 2
    assert "the authors' layout has no attention_type for this model's mixer" in capsys.readouterr().err


@exhaustive("test_importing.py, which trains from the authors' checkpoint, and the gradients above, with a tied head")
def test_training_goes_on_from_it(imported, tmp_path):
    """A step changes the embedding, which is the head as well."""
    workdir = tmp_path / "run"
    shutil.copytree(imported, workdir)
    (tmp_path / "text.txt").write_text("".join(f"{n % 96} {n * n % 96}\n" for n in range(1000)))
    values = {
        "data.source": "files", "data.paths": tmp_path / "text.txt", "data.cache_dir": tmp_path / "tokens", "steps": 1,
        "sample.tokens": 4, "optimizer.warmup_steps": 0, "length": 32, "batch_size": 2, "eval_rows": 2,
        "eval_every": 1, "checkpoint_every": 1, "log_every": 1, "execution.remat": "none",
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    assert train(["--config", str(workdir / "config.py"), "--workdir", str(workdir), *overrides]) == 0
    assert checkpoint_steps(workdir / "checkpoints") == [0, 1]
    before, after = (generate.load(one, "latest")[1] for one in (imported, workdir))
    assert before.keys() == after.keys()
    assert np.abs(np.asarray(before["embedding"]["embedding"] - after["embedding"]["embedding"])).max() > 0
    assert np.isfinite(json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["train/loss"])


def test_state_spaces_layout_is_the_same_model(loaded, state_spaces, tmp_path):
    directory = state_spaces()
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    model, params, _ = generate.load(tmp_path / "run", "best")
    assert model.config == loaded[0].config
    assert_same_bits(params, loaded[1])


def test_state_spaces_pickle_is_the_same_model(loaded, state_spaces, tmp_path):
    """As it is on the hub: a pickle, in which the head is the embedding's own tensor."""
    torch = pytest.importorskip("torch")
    directory = state_spaces()
    (directory / "model.safetensors").unlink()
    tensors = {key: torch.from_numpy(value) for key, value in released_tensors().items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, directory / "pytorch_model.bin")
    assert main(["import", str(directory), "--workdir", str(tmp_path / "run")]) == 0
    assert_same_bits(generate.load(tmp_path / "run", "best")[1], loaded[1])


@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        (mamba2.STATE_SPACES, STATE_SPACES, {"qk_dim": 32}),
        (
            mamba2.STATE_SPACES,
            STATE_SPACES
            | {"ssm_cfg": {"layer": "Mamba2", "ngroups": 2, "headdim": 8, "D_has_hdim": True, "d_conv": 2}},
            {"qk_groups": 2, "norm_groups": 2, "d_per_head": False, "conv_width": 2},
        ),
        (mamba2.STATE_SPACES, STATE_SPACES | {"tie_embeddings": False, "ssm_cfg": {"layer": "Mamba2"}}, {}),
        (
            mamba2.HUGGING_FACE,
            json.loads((CHECKPOINT / "config.json").read_text())
            | {"n_groups": 2, "use_conv_bias": False, "tie_word_embeddings": False},
            {"qk_dim": 32, "qk_groups": 2, "conv_bias": False},
        ),
    ],
    ids=["one group", "two groups", "untied", "Hugging Face's"],
)
def test_settings_are_fields_and_tensors_hold_every_parameter(kind, config, fields):
    variant, model = kind.read_model(config, "config.json")
    entry = f"mamba2-released({', '.join(f'{key}={value}' for key, value in fields.items())})"
    assert model.layer_mixers == parse_pattern(variant, 2) == parse_pattern(entry if fields else "mamba2-released", 2)
    assert model.tie_embeddings == config.get("tie_embeddings", config.get("tie_word_embeddings"))
    draw = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), parameter_shapes(LanguageModel(model))
    )
    found = jax.tree.map(np.zeros_like, tree)
    for tensor in kind.tensors(model).values():
        for parameter, values in tensor.unpack(tensor.pack(tree)):
            assert not parameter.of(found).any()
            parameter.of(found)[...] = values
    assert_same_bits(found, tree)


def refused(directory, capsys):
    """The line with which the import ends; nothing is written."""
    workdir = directory.parent / "refused"
    assert main(["import", str(directory), "--workdir", str(workdir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not workdir.exists()
    return line


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu', which is what this library has of Mamba-2"),
        ({"use_bias": True}, "use_bias=True, expected False"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit=[0.001, 0.1], expected [0.0, inf]"),
        ({"conv_kernel": 5}, "a convolution of 5 tokens, expected 2, 3 or 4"),
        ({"conv_kernel": 1}, "a convolution of 1 tokens, expected 2, 3 or 4"),
        ({"expand": 3}, "expand * hidden_size = 96, expected num_heads * head_dim = 64"),
        ({"n_groups": 3}, "num_heads=4 must be a multiple of qk_groups=3"),
        ({"num_hidden_layers": "two"}, "config.json: "),
        ({"expand": None}, "config.json: unsupported operand type(s) for *: 'NoneType' and 'int'"),
        (
            {"n_groups": 2},
            "backbone.layers.0.mixer.in_proj.weight has shape [196, 32], expected [260, 32] by config.json",
        ),
        ({"tie_word_embeddings": False}, "the checkpoint lacks lm_head.weight: expected 21 tensors"),
        (
            {"use_conv_bias": False},
            "has backbone.layers.0.mixer.conv1d.bias, backbone.layers.1.mixer.conv1d.bias, which",
        ),
        ({"num_hidden_layers": 3}, "lacks backbone.layers.2.norm.weight, backbone.layers.2.mixer.in_proj.weight"),
    ],
    ids=str,
)
def test_hugging_face_config_that_does_not_fit_is_refused(config, line, hugging_face, capsys):
    assert line in refused(hugging_face(config), capsys)


@pytest.mark.parametrize(
    ("config", "ssm_cfg", "line"),
    [
        ({"ssm_cfg": {}}, {}, "ssm_cfg.layer='Mamba1', expected 'Mamba2'"),
        ({"ssm_cfg": "Mamba2"}, {}, "ssm_cfg='Mamba2', expected an object"),
        ({"attn_layer_idx": [1]}, {}, "attn_layer_idx=[1], expected []"),
        ({"d_intermediate": 64}, {}, "d_intermediate=64, expected 0"),
        ({"rms_norm": False}, {}, "rms_norm=False, expected True"),
        ({}, {"rmsnorm": False}, "ssm_cfg.rmsnorm=False, expected True"),
        ({}, {"norm_before_gate": True}, "ssm_cfg.norm_before_gate=True, expected False"),
        ({}, {"d_ssm": 32}, "ssm_cfg.d_ssm=32, expected None"),
        ({}, {"dstate": 32}, "unknown ssm_cfg.dstate: expected the arguments of state-spaces' Mamba2"),
        ({}, {"headdim": 48}, "expand * d_model = 64, expected a multiple of headdim = 48"),
        ({}, {"headdim": 0}, "config.json: integer modulo by zero"),
        ({"vocab_size": 97}, {}, "backbone.embedding.weight has shape [96, 32], expected [112, 32]"),
    ],
    ids=str,
)
def test_state_spaces_config_that_does_not_fit_is_refused(config, ssm_cfg, line, state_spaces, capsys):
    assert line in refused(state_spaces(config, ssm_cfg), capsys)


def test_config_without_a_size_is_refused(hugging_face, capsys):
    line = refused(hugging_face(drop=["state_size"]), capsys)
    assert "lacks state_size: expected the config.json of save_pretrained" in line


def test_tied_head_that_is_not_the_embedding_is_refused(state_spaces, capsys):
    line = refused(state_spaces(tensors={"lm_head.weight": np.ones((96, 32), np.float32)}), capsys)
    assert "lm_head.weight is not backbone.embedding.weight, and by config.json the two are tied" in line


def test_what_hugging_face_does_not_read_changes_nothing():
    """Its norm is behind the gate, whatever config.json says; that of Mamba-Codestral-7B-v0.1 says otherwise."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    told = config | {"norm_before_gate": True}
    assert mamba2.HUGGING_FACE.read_model(told, "x") == mamba2.HUGGING_FACE.read_model(config, "x")


def test_limits_as_transformers_5_writes_them_are_read():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, math.inf]
    tagged = config | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert mamba2.HUGGING_FACE.read_model(tagged, "x") == mamba2.HUGGING_FACE.read_model(config, "x")
