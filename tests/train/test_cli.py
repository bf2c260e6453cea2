"""Mistakes on the command line: one clear line, exit status 2, no traceback, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from support.exhaustive import exhaustive

import train
from train.configuration import load_config
from train.errors import UserError
from train.main import last_line, main, parse_arguments

ROOT = Path(train.__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config"),
        (["--config"], "expected one argument"),
        (["--config", "c.py", "extra"], "unknown argument 'extra'"),
        (["--config", "c.py", "--steps=3"], "unknown argument '--steps=3'"),
        (["--config", "c.py", "--config.steps"], "--config.steps has no value: write --config.steps=VALUE"),
        (
            ["--config", "c.py", "--config.sample.prompt", "--config.seed=3"],
            "has no value, '--config.seed=3' stands behind it: write --config.sample.prompt=VALUE",
        ),
        (["--config", "c.py", "--config.steps", "--workdir=w", "3"], "'--workdir=w' stands behind it"),
        (["--config", "c.py", "--workdir="], "--workdir is empty"),
        (["--config", "c.py", "--workdir=~nobody.here/x"], "'~nobody.here/x': there is no home directory of that user"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(UserError) as error:
        parse_arguments(arguments)
    assert message in str(error.value)


def test_both_spellings_of_an_override():
    options, overrides = parse_arguments(["--config", "c", "--config.a.b=x=1", "--config.c", "-1"])
    assert overrides == [("a.b", "x=1"), ("c", "-1")]
    assert (options.config, options.workdir, options.debug) == ("c", None, False)


def test_a_tilde_behind_an_option_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    options, _ = parse_arguments(["--config=~/my.py:nano", "--workdir=~/runs/~x"])
    assert (options.config, options.workdir) == ("/home/somebody/my.py:nano", Path("/home/somebody/runs/~x"))


@pytest.mark.parametrize(
    ("decay_steps", "step", "words"),
    [
        (None, 7, "to resume: COMMAND"),
        (None, 800, "more steps are another run; to show this one again: COMMAND"),
        (1000, 800, "with a larger --config.steps, to extend: COMMAND"),
    ],
)
def test_the_last_line_says_what_its_command_does(decay_steps, step, words):
    config = load_config(str(ROOT / "configs/2mamba.py"))
    config.optimizer.decay_steps = decay_steps
    assert last_line(config, step, "COMMAND").endswith(words)


def test_debug_shows_where_a_mistake_was_noticed(capsys):
    assert main(["--config", str(ROOT / "configs/2mamba.py"), "--config.variant=2mambo", "--debug"]) == 2
    errors = capsys.readouterr().err
    assert "in parse_pattern" in errors
    assert errors.splitlines()[-1].startswith("error: unknown variant '2mambo'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 3}, ["unknown config key 'stepz'", "'steps'"]),
        ({"steps": "many"}, ["--config.steps takes int, got 'many'"]),
        ({"steps": 0}, ["steps=0 must be at least 1"]),
        ({"eval_rows": 0}, ["eval_rows=0"]),
        ({"optimizer.warmup_steps": -1}, ["optimizer.warmup_steps=-1"]),
        ({"optimizer.decay_steps": 0}, ["optimizer.decay_steps=0", "must be at least 1"]),
        ({"optimizer.schedule": "cosin"}, ["unknown optimizer.schedule 'cosin'", "'cosine'"]),
        ({"sample.temperature": -1}, ["sample.temperature=-1.0"]),
        ({"sample.tokens": 0}, ["sample.tokens=0"]),
        ({"variant": "2mambo"}, ["2mambo", "2mamba"]),
        ({"variant": "softmax,softmax"}, ["softmax"]),
        ({"execution.remat": True}, ["remat='True' is unknown: expected one of none, states, dots, full"]),
        ({"execution.form": "diagonal"}, ["diagonal"]),
        ({"execution.form": "recurrent", "execution.chunk_size": 4}, ["chunk_size=4", "recurrent"]),
        ({"execution.implementation": "mosaic_gpu"}, ["mosaic_gpu"]),
        ({"execution.chunk_size": 0}, ["chunk_size"]),
        ({"execution.dtype": "float31"}, ["unknown execution.dtype 'float31'", "'float32'"]),
        ({"execution.precision": "lowest"}, ["lowest"]),
        ({"model.num_heads": 3, "model.num_kv_heads": 2}, ["num_heads=3", "num_kv_heads=2"]),
        ({"model.vocab_size": 256}, ["model.vocab_size=256 is too small", "up to 256"]),
        ({"mesh.data": 3}, ["mesh.data=3", "number of devices"]),
        ({"data.source": "webb"}, ["unknown data.source 'webb'", "corpus"]),
        ({"data.root": "/nowhere"}, ["data.root '/nowhere' is not a directory"]),
        ({"data.suffix": ".none"}, ["the corpus is empty"]),
        ({"data.held_out_percent": 0}, ["the held-out split", "is empty"]),
        ({"sample.prompt": ""}, ["sample.prompt"]),
        ({"microbatches": 0}, ["microbatches=0 must be at least 1"]),
        ({"microbatches": 3}, ["batch_size=4 must be a multiple of microbatches x mesh.data x mesh.fsdp = 3 x 1"]),
        ({"loss_chunk_size": 0}, ["loss_chunk_size=0 must be at least 1"]),
        ({"skip_limit": 0}, ["skip_limit=0 must be at least 1"]),
        ({"profile.start": 0}, ["profile.start=0 must be at least 1"]),
        ({"data.packing": "document"}, ["unknown data.packing 'document'", "'documents'"]),
        ({"data.tokenizer": "none.json"}, ["there is no tokenizer file 'none.json'"]),
        ({"data.source": "files"}, ["data.paths is empty"]),
        ({"data.source": "files", "data.paths": "/nowhere"}, ["data.paths: '/nowhere' is no file"]),
        ({"data.source": "huggingface", "data.dataset": "a/b"}, ["'a/b' is no directory here", "data.revision"]),
    ],
)
def test_bad_values(user_error, tiny, tmp_path, changes, words):
    workdir = tmp_path / "run"
    line = user_error(tiny(workdir, **changes))
    assert all(word in line for word in words), line
    assert not workdir.exists()


def test_a_line_that_is_no_document_is_named(user_error, tiny, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut o\n')
    options = {"data.source": "files", "data.paths": path, "data.cache_dir": tmp_path / "tokens"}
    assert f"{path} line 2 is not JSON" in user_error(tiny(tmp_path / "run", **options))
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["texts.jsonl", "tokens"]


def test_a_file_to_train_on_and_to_hold_out(user_error, tiny, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n')
    paths = {"data.paths": tmp_path, "data.held_out_paths": tmp_path / "texts.jsonl"}
    assert "texts.jsonl is in data.paths and in data.held_out_paths" in user_error(
        tiny(tmp_path / "run", **{"data.source": "files"}, **paths)
    )


def test_a_tokenizer_with_more_tokens_than_the_model_has(user_error, tiny, tmp_path, tokenizer_json):
    options = {"data.tokenizer": tokenizer_json, "model.vocab_size": 300}
    assert "model.vocab_size=300 is too small: the data has tokens up to 399" in user_error(tiny(tmp_path, **options))


def test_a_dataset_without_the_split(user_error, tiny, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "fine"}\n')
    options = {"data.source": "huggingface", "data.dataset": tmp_path / "set", "data.cache_dir": tmp_path / "tokens"}
    line = user_error(tiny(tmp_path / "run", **options, data__split="val"))
    assert "cannot load split 'val' of data.dataset" in line
    assert "the held-out split has no document" in user_error(tiny(tmp_path / "run", **options))


def test_a_tokenizer_of_another_digest_in_the_workdir(user_error, tiny, finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    corpus = json.loads((workdir / "corpus.json").read_text())
    (workdir / "corpus.json").write_text(json.dumps(corpus | {"tokenizer": "other"}))
    assert "was trained on another tokenizer: its digest is other, this tokenizer's is bytes" in user_error(
        tiny(workdir)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no configuration file"]),
        ("x = 1", ["has no function get_config"]),
        ("import nothing_of_that_name", ["ModuleNotFoundError", "nothing_of_that_name"]),
        ("def get_config(:", ["SyntaxError"]),
        ("def get_config():\n    return {}", ["returned dict"]),
        ("def get_config():\n    return 1 / 0", ["ZeroDivisionError"]),
        ("def get_config():\n    raise SystemExit(3)", ["SystemExit: 3"]),
    ],
)
def test_bad_configuration_files(user_error, tmp_path, content, words):
    path = tmp_path / "my-config.py"
    if content is not None:
        path.write_text(content)
    line = user_error(["--config", str(path)])
    assert all(word in line for word in [*words, "my-config.py"]), line


def test_a_configuration_for_an_older_version_is_one_line(user_error, tmp_path):
    path = tmp_path / "mine.py"
    lines = ["from configs import base", "def get_config():", "    c = base.get_config('mine', '2mamba', 'nano')"]
    path.write_text("\n".join([*lines, "    del c.distributed", "    return c"]))
    assert "the configuration lacks distributed" in user_error(
        ["--config", str(path), "--workdir", str(tmp_path / "w")]
    )
    assert not (tmp_path / "w").exists()


def test_sizes(user_error, tmp_path):
    assert "unknown size 'huge'" in user_error(["--config", str(ROOT / "configs/2mamba.py:huge")])
    path = tmp_path / "c.py"
    path.write_text("def get_config():\n    pass")
    assert "takes no size" in user_error(["--config", f"{path}:small"])


def test_a_workdir_of_another_run(user_error, tiny, finished):
    line = user_error(tiny(finished, seed=4))
    assert "holds another run: seed is 0 there and 4 here" in line


def test_a_workdir_of_other_data(user_error, tiny, finished, corpus_root):
    extra = corpus_root / "extra.py"
    extra.write_text("x = 1\n")
    try:
        assert "was trained on other data" in user_error(tiny(finished))
    finally:
        extra.unlink()


def test_a_workdir_that_is_a_file(user_error, tiny, tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    assert "is not a directory" in user_error(tiny(path))


@exhaustive("test_processes.py, whose process exits so, and the status of main in this process above")
def test_the_process_itself_exits_with_2(start, tiny, tmp_path):
    process = start(tiny(tmp_path, variant="2mambo"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
