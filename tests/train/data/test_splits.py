"""Training and held-out splits out of a configuration: nothing is in both, and data is known wherever it lies."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

import train
from train.configuration import apply_overrides, load_config
from train.data.task import make_task
from train.errors import UserError
from train.workdir import claim, default_workdir

pytestmark = pytest.mark.quick

CONFIG = str(Path(train.__file__).parents[1] / "configs/2mamba.py")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory to work in, with sixty text files in `data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    for number in range(60):
        (tmp_path / f"data/f{number}.txt").write_text(f"text {number}")
    return tmp_path


@pytest.fixture
def task():
    """A function from changed keys of `data`, all others the default, to a configuration and its task."""

    def make(told=None, **changes):
        config = load_config(CONFIG)
        settings = {"held_out_percent": 20} | changes
        apply_overrides(config, [(f"data.{key}", str(value)) for key, value in settings.items()])
        return config, make_task(config, (lambda _: None) if told is None else told.append)

    return make


def documents_of(task):
    sizes = task.identity
    return sizes["train_documents"], sizes["held_out_documents"]


def test_a_file_under_two_names_is_in_one_split(directory, task):
    expected = task(source="files", paths="data")[1].identity
    (directory / "data/links").mkdir()
    for number in range(0, 60, 2):
        (directory / f"data/links/z{number}").symlink_to(f"../f{number}.txt")
        (directory / f"data/g{number}.txt").hardlink_to(directory / f"data/f{number}.txt")
    told = []
    assert task(told, source="files", paths="data,data/links")[1].identity == expected
    assert told[0] == "reading 60 files, 0.0 MB; 90 more names of the same files"


@pytest.mark.parametrize("kind", ["itself", "symbolic link", "hard link"])
def test_a_held_out_file_that_is_trained_on_is_refused(directory, task, kind):
    held_out = directory / ("data/f7.txt" if kind == "itself" else "held.txt")
    if kind == "symbolic link":
        held_out.symlink_to("data/f7.txt")
    elif kind == "hard link":
        held_out.hardlink_to("data/f7.txt")
    with pytest.raises(UserError, match=r"data/f7\.txt is in data\.paths and in data\.held_out_paths: it would be"):
        task(source="files", paths="data", held_out_paths=held_out)


@pytest.mark.parametrize("source", ["text", "json line", "dataset"])
def test_of_a_single_document_the_end_is_held_out(directory, task, source):
    text = "To be, or not to be.\n" * 100
    if source == "text":
        (directory / "input.txt").write_text(text)
        changes = {"source": "files", "paths": "input.txt"}
    else:
        (directory / "one").mkdir()
        (directory / "one/train.jsonl").write_text(json.dumps({"text": text}))
        files, hub = {"source": "files", "paths": "one"}, {"source": "huggingface", "dataset": "one"}
        changes = files if source == "json line" else hub
    found = task(**changes)[1]
    assert documents_of(found) == (1, 1)
    assert (found.identity["train_bytes"], found.identity["held_out_bytes"]) == (80 * 21, 20 * 21)
    assert bytes(found.held_out[0]["tokens"][:6].tolist()) == b"To be,"


def save(directory, kind):
    """A dataset of TEXTS in `directory`/`kind`."""
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(50)]})
    if kind == "saved":
        table.save_to_disk("saved")
    elif kind == "saved validation":
        datasets.Dataset.from_dict(table.to_dict(), split="validation").save_to_disk(kind)
    else:
        datasets.DatasetDict({"train": table, "validation": table.select(range(5))}).save_to_disk(kind)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("saved", {"held_out_split": "validation"}, "was saved without splits, so data.split='train' with data.held"),
        ("saved", {"held_out_split": "train"}, "was saved without splits"),
        ("saved", {"split": "test"}, "was saved without splits, so data.split='test'"),
        ("saved", {"held_out_split": "validation", "streaming": True}, "was saved without splits"),
        ("saved", {}, 50),
        ("saved validation", {"split": "validation"}, 50),
        ("splits", {"held_out_split": "train"}, "data.held_out_split='train' is in data.split='train': it would be"),
        ("splits", {"held_out_split": "train", "streaming": True}, "is in data.split='train'"),
        ("splits", {"split": "train+validation", "held_out_split": "validation"}, "is in data.split='train.valida"),
        ("splits", {"split": "all", "held_out_split": "validation"}, "is in data.split='all'"),
        ("splits", {"held_out_split": "validation"}, (50, 5)),
    ],
)
def test_a_held_out_split_that_is_trained_on_is_refused(directory, task, kind, changes, expected):
    save(directory, kind)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            task(source="huggingface", dataset=f"~/{kind}", **changes)
        return
    found = documents_of(task(source="huggingface", dataset=f"~/{kind}", **changes)[1])
    assert (found if isinstance(expected, tuple) else sum(found)) == expected


def test_a_directory_named_like_a_reader_of_the_package_is_read(directory, task):
    """Under such a name the package would take files from anywhere below the working directory."""
    for place in ("json", "elsewhere"):
        (directory / place).mkdir()
        for split in ("train", "validation"):
            (directory / place / f"{split}.jsonl").write_text('{"text": "some text"}\n' * 30)
    assert documents_of(task(source="huggingface", dataset="json", held_out_split="validation")[1]) == (30, 30)


def test_a_split_that_is_a_link_to_another_is_refused(directory, task):
    (directory / "set").mkdir()
    (directory / "set/train.jsonl").write_text('{"text": "some text"}\n' * 30)
    (directory / "set/validation.jsonl").hardlink_to("set/train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl and .*validation\.jsonl are one file, which could be trained"):
        task(source="huggingface", dataset="set", held_out_split="validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": "data"}, "data.paths='data' would not be read: data.source is 'corpus'; set data.source=files"),
        ({"source": "files", "paths": "data", "dataset": "d"}, "data.dataset='d' would not be read"),
        ({"source": "huggingface", "dataset": "data", "held_out_paths": "x"}, "data.held_out_paths='x' would not"),
    ],
)
def test_data_that_the_source_does_not_read_is_refused(directory, task, changes, message):
    with pytest.raises(UserError, match=message):
        task(**changes)


SOURCES = {
    "files": {"source": "files", "paths": "{}/data"},
    "corpus": {"source": "corpus", "root": "{}/data", "suffix": ".txt"},
    "held-out files": {"source": "files", "paths": "{}/data/*[1-9].txt", "held_out_paths": "{}/data/*0.txt"},
    "dataset": {"source": "huggingface", "dataset": "{}/splits", "held_out_split": "validation"},
    "stream": {"source": "huggingface", "dataset": "{}/splits", "streaming": True},
}


@pytest.mark.parametrize("source", SOURCES)
def test_data_that_was_moved_is_the_same_run(directory, task, sentencepiece_model, source):
    save(directory, "splits")
    shutil.copy(sentencepiece_model, "llama.model")
    workdir = directory / "run"

    def at(place):
        changes = {key: str(value).format(place) for key, value in SOURCES[source].items()}
        config, found = task(tokenizer=f"{place}/llama.model", cache_dir="~/tokens", **changes)
        claim(workdir, config, found.identity)
        return default_workdir(config, load_config(CONFIG)), found

    first, found = at(directory)
    moved = directory / "moved"
    moved.mkdir()
    for name in ("data", "splits", "llama.model"):
        (directory / name).rename(moved / name)
    second, again = at("~/moved")
    assert first != second  # the default is a name for the command, and the command is another
    assert again.identity == found.identity
    assert len(list((directory / "tokens").glob("*"))) == (source not in ("corpus", "stream"))
    assert json.loads((workdir / "config.json").read_text())["data"]["tokenizer"] == "~/moved/llama.model"


def test_the_same_files_read_as_other_documents_are_refused(directory, task):
    config, found = task(source="files", paths="data")
    claim(directory / "run", config, found.identity)
    claim(directory / "run", config, found.identity | {"a_figure_of_a_later_version": 1})
    with pytest.raises(UserError, match=r"same files read in another way: its train_tokens is \d+, now 7; choose"):
        claim(directory / "run", config, found.identity | {"train_tokens": 7})
