"""Configurations: files, sizes, typed overrides, and whether a workdir belongs to a run."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict, FieldReference

import train
from train.configuration import apply_overrides, build_model, flatten, load_config, to_json, validate
from train.errors import UserError, nearest
from train.keys import KEYS
from train.workdir import claim, default_workdir

pytestmark = pytest.mark.quick

NAMES = ("2mamba", "2mamba_e", "mamba2", "mamba2_released", "mamba2s", "linear", "softmax", "2mamba_recall")
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


@pytest.mark.parametrize("size", ["nano", "small"])
def test_the_recipe_is_the_paper_s_model_but_for_its_variant_and_b2(size):
    recipe, paper = (flatten(load(size, name)) for name in ("2mamba_long", "2mamba"))
    changes = {key: value for key, value in recipe.items() if value != paper[key]}
    assert changes == {"name": "2mamba_long", "variant": "2mamba-dt-long", "optimizer.b2": 0.95}


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
    for text in ("2", "1,2,3", "a,b", "{[]: 1}", "(" * 1000):
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
        ("optimizer.learning_rate", "1e400", "takes float, got '1e400'"),
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


def refusal(config) -> str:
    """The one line by which a configuration is refused: before anything is built, or when the model is."""

    def check() -> None:
        validate(config)
        build_model(config)

    with pytest.raises(UserError) as error:
        check()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["2mamba", "2mamba_recall"])
def test_every_key_has_the_type_and_need_that_keys_says(name):
    """A new key of a configuration has its type and range in train/keys.py."""
    config = load(name=name)
    flat = flatten(config)
    needed = {key for key, entry in KEYS.items() if config.data.source in entry.sources}
    assert needed <= flat.keys() <= KEYS.keys()
    for key in flat:
        group, _, last = key.rpartition(".")
        owner = config[group] if group else config
        optional = isinstance(dict(owner.items(preserve_field_references=True))[last], FieldReference)
        assert (owner.get_type(last), optional) == (KEYS[key].kind, KEYS[key].optional), key
    validate(config)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.b1", 1.0, "must be at least 0 and below 1"),
        ("optimizer.b1", -0.1, "must be at least 0 and below 1"),
        ("optimizer.b2", 1.5, "must be at least 0 and below 1"),
        ("optimizer.b2", 1 - 1e-9, "below 1, but is 1 in float32"),
        ("optimizer.eps", 0.0, "must be above 0 and finite"),
        ("optimizer.eps", 1e-50, "above 0 and finite, but is 0 in float32"),
        ("optimizer.eps", float("nan"), "must be above 0 and finite"),
        ("optimizer.learning_rate", -1.0, "must be above 0 and at most 1e+31"),
        ("optimizer.learning_rate", 0.0, "must be above 0 and at most 1e+31"),
        ("optimizer.learning_rate", 1e39, "above 0 and at most 1e+31"),
        ("optimizer.learning_rate", float("inf"), "must be above 0 and at most 1e+31"),
        ("optimizer.weight_decay", -1.0, "must be at least 0 and at most 1000"),
        ("optimizer.clip_norm", -1.0, "must be above 0 and finite, or None"),
        ("optimizer.clip_norm", 0.0, "must be above 0 and finite, or None"),
        ("optimizer.final_fraction", float("nan"), "must be finite"),
        ("optimizer.decay_steps", 2**31, "must be at most 2147483647, or None"),
        ("seed", 2**63, "must be at least 0 and at most 9223372036854775807"),
        ("seed", -1, "must be at least 0"),
        ("steps", 2**31, "at most 2147483647"),
        ("length", 2**31 - 1, "at most 1073741824"),
        ("batch_size", 2**31 - 1, "at most 1048576"),
        ("checkpoints_kept", 0, "must be at least 1"),
        ("model.num_layers", 10**9, "at most 65536"),
        ("model.rope_theta", float("inf"), "must be above 0 and finite"),
        ("model.norm_eps", float("nan"), "must be above 0 and finite"),
        ("data.held_out_percent", 101, "at most 100"),
        ("data.held_out_percent", -1, "must be at least 0"),
        ("distributed.num_processes", 0, "must be at least 1"),
        ("profile.start", 801, "must be at most steps=800"),
        ("sample.temperature", float("nan"), "must be at least 0 and finite"),
        ("steps", "3", "takes int, got '3'"),
        ("steps", True, "takes int, got True"),
        ("steps", None, "takes int, got None"),
        ("eval_rows", 1.5, "takes None or int, got 1.5"),
        ("data.streaming", 1, "takes bool, got 1"),
        ("execution.dtype", float, "takes str, got <class 'float'>"),
        ("model", 3, "must be a group of keys"),
        ("model.dropout", 0.1, "unknown config key 'model.dropout'; known: d_model"),
        ("model.mixers", 1, "unknown config key 'model.mixers'"),
        ("execution.dtypes", 1, "unknown config key 'execution.dtypes'; did you mean 'dtype'?"),
        ("mine", float, "mine=<class 'float'> cannot be kept in config.json"),
        ("mine", float("nan"), "mine=nan cannot be kept in config.json"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_trained_with_is_refused(key, value, words):
    config = load().unlock()
    group, _, last = key.rpartition(".")
    with config.ignore_type():
        (config[group] if group else config)[last] = value
    line = refusal(config)
    assert key in line
    assert words in line


def test_values_at_the_ends_of_their_ranges_are_taken():
    ends = {"optimizer.b1": "0", "optimizer.b2": "0.9999999", "optimizer.eps": "2e-38", "seed": str(2**63 - 1)}
    ends |= {"optimizer.weight_decay": "0", "optimizer.clip_norm": "None", "data.held_out_percent": "100"}
    config = load().unlock()
    config.execution.scan_layers = True
    config.mine = ConfigDict({"anything": [1, 2]})  # means nothing to the trainer
    config.optimizer.unlock().learning_rate = 1  # an int where a float is expected
    apply_overrides(config, ends.items())
    validate(config)
    assert build_model(config).execution.scan_layers is True


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["distributed"], "lacks distributed:"),
        (["model.num_heads", "seed", "log"], "lacks seed, model.num_heads, log:"),
        (["data.suffix"], "lacks data.suffix:"),
        (["data.source"], "lacks data.source:"),
    ],
    ids=str,
)
def test_a_missing_key_is_named(missing, words):
    config = load().unlock()
    for key in missing:
        group, _, last = key.rpartition(".")
        del (config[group] if group else config)[last]
    assert words in refusal(config)


def test_a_key_without_a_reader_may_be_missing():
    config = load().unlock()
    for key in ("dataset", "paths", "cache_dir", "shuffle_rows"):  # of other sources than `corpus`
        del config.data[key]
    del config.execution["form"]
    validate(config)
    build_model(config)


def test_a_configuration_of_another_program_is_one_line():
    assert "lacks size, variant, seed, model, execution, data, batch_size" in refusal(
        ConfigDict({"name": "a", "steps": 3})
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("FrozenConfigDict(config)", None),
        ("sys.exit(3)", "raised SystemExit: 3"),
        ("ConfigDict({'steps': config_dict.required_placeholder(int)})", "returned a required placeholder"),
    ],
    ids=str,
)
def test_what_else_get_config_may_return(tmp_path, body, words):
    path = tmp_path / "mine.py"
    lines = ["import sys", "from ml_collections import ConfigDict, FrozenConfigDict, config_dict"]
    lines += ["def get_config():", "    config = ConfigDict({'steps': 3})", f"    return {body}"]
    path.write_text("\n".join(lines))
    if words is None:
        config = load_config(str(path))
        apply_overrides(config, [("steps", "7")])
        assert config.steps == 7
    else:
        with pytest.raises(UserError, match=words):
            load_config(str(path))
