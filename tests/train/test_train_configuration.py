"""Configurations: files, sizes, typed overrides, and whether a workdir belongs to a run."""

import json
from pathlib import Path

import pytest

import train
from train.configuration import apply_overrides, load_config, to_json
from train.errors import UserError, nearest
from train.workdir import claim, default_workdir

NAMES = ("2mamba", "2mamba_e", "mamba2", "mamba2s", "linear", "softmax", "2mamba_recall")
CORPUS = {"digest": "d"}
ROOT = Path(train.__file__).parents[1]


def load(size: str = "", name: str = "2mamba"):
    return load_config(f"{ROOT / 'configs' / name}.py" + (size and f":{size}"))


def changed(**overrides):
    config = load()
    apply_overrides(config, [(key.replace("__", "."), value) for key, value in overrides.items()])
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_file_gives_a_configuration(name):
    config = load(name=name)
    assert config.name == name
    assert config.size == "nano"
    assert json.loads(to_json(config))["variant"] == name.replace("_recall", "").replace("_", "-")


def test_the_paper_s_sizes_and_schedule():
    for size, d_model, mlp, heads, layers in (("small", 1024, 2048, 16, 20), ("medium", 1536, 3072, 24, 27)):
        config = load(size)
        model, optimizer = config.model, config.optimizer
        assert (model.d_model, model.mlp_dim, model.num_heads, model.num_layers) == (d_model, mlp, heads, layers)
        assert (model.head_dim, model.vocab_size, config.length, config.batch_size) == (64, 32000, 2048, 32)
        assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay_steps) == (1e-4, 10_000, 1_000_000)
        assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-7, 0.01)
        assert (config.steps, config.execution.dtype, optimizer.clip_norm) == (100_000, "bfloat16", None)


def test_overrides_take_the_type_of_the_key():
    config = changed(
        steps="7",
        optimizer__learning_rate="1",
        execution__remat="full",
        execution__form="chunked",
        execution__chunk_size="16",
        optimizer__decay_steps="none",
        eval_rows="None",
        variant="None",
    )
    assert config.steps == 7
    assert type(config.optimizer.learning_rate) is float
    assert config.optimizer.learning_rate == 1.0
    assert config.execution.remat == "full"
    assert config.execution.form == "chunked"
    assert config.execution.chunk_size == 16
    assert config.optimizer.decay_steps is None
    assert config.eval_rows is None
    assert config.variant == "None"  # not an optional key: its text is its text


def test_tuples():
    config = load(name="2mamba_recall")
    apply_overrides(config, [("data.gap", "2,3")])
    assert config.data.gap == (2, 3)
    for text in ("2", "1,2,3", "a,b"):
        with pytest.raises(UserError, match=r"data\.gap takes"):
            apply_overrides(config, [("data.gap", text)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stepz", "7", "unknown config key 'stepz'; did you mean 'steps'?"),
        ("optimizer.learning_rat", "7", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer", "7", "config key 'optimizer' is a group: set one of optimizer."),
        ("steps", "1.5", "--config.steps takes int, got '1.5'"),
        ("steps", "None", "--config.steps takes int, got 'None'"),
        ("eval_rows", "many", "--config.eval_rows takes None or int, got 'many'"),
        ("optimizer.learning_rate", "nan", "takes float, got 'nan'"),
        ("data.streaming", "maybe", "takes bool, got 'maybe'"),
    ],
)
def test_wrong_overrides(key, value, message):
    with pytest.raises(UserError) as error:
        apply_overrides(load(), [(key, value)])
    assert message in str(error.value)


def test_nearest_lists_all_where_none_is_near():
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def test_default_workdir_is_a_function_of_what_makes_the_run():
    plain = default_workdir(load(), load())
    assert plain.as_posix() == "runs/2mamba-nano"
    assert default_workdir(changed(seed="0", log_every="3"), load()) == plain
    other = default_workdir(changed(seed="1"), load())
    assert other == default_workdir(changed(seed="1"), load())
    assert other.name.startswith("2mamba-nano-")
    assert other != default_workdir(changed(seed="2"), load())


def test_a_workdir_holds_one_run(tmp_path):
    claim(tmp_path, changed(), CORPUS)
    claim(tmp_path, changed(), CORPUS)
    with pytest.raises(UserError) as error:
        claim(tmp_path, changed(seed="5", optimizer__clip_norm="2"), CORPUS)
    assert "seed is 0 there and 5 here" in str(error.value)
    assert "optimizer.clip_norm is 1.0 there and 2.0 here" in str(error.value)
    with pytest.raises(UserError, match="trained on other data: its digest is d, this data's is e"):
        claim(tmp_path, changed(), {"digest": "e"})


def test_free_keys_may_change_and_are_recorded(tmp_path):
    claim(tmp_path, changed(), CORPUS)
    free = {"log_every": "3", "mesh__data": "1", "microbatches": "2", "execution__remat": "dots"}
    claim(tmp_path, changed(**free, sample__temperature="0"), CORPUS)
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 3


def test_steps_may_change_only_where_the_schedule_does_not_end_with_them(tmp_path):
    claim(tmp_path / "a", changed(), CORPUS)
    with pytest.raises(UserError, match=r"steps is .* there and 77 here"):
        claim(tmp_path / "a", changed(steps="77"), CORPUS)
    claim(tmp_path / "b", changed(optimizer__decay_steps="5000"), CORPUS)
    claim(tmp_path / "b", changed(optimizer__decay_steps="5000", steps="77"), CORPUS)


def test_damaged_or_missing_records_are_refused(tmp_path):
    claim(tmp_path, changed(), CORPUS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not readable JSON"):
        claim(tmp_path, changed(), CORPUS)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        claim(tmp_path, changed(), CORPUS)
