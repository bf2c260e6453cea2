"""Whole runs on a user's own text: every source, through `train.main`, and resumed in the middle bit for bit."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from support.exhaustive import exhaustive

from train.data.tokenizers import load_kept_tokenizer
from train.main import main
from train.observe.metrics import read_metrics

TEXTS = [f"def f{number}(x):\n    return x + {number}\n" * (number % 4 + 1) for number in range(60)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face dataset: one half of it Parquet, the other JSON lines, each with a validation split."""
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("dataset")
    for name, texts in (("train", TEXTS), ("validation", TEXTS[::9])):
        (root / "parquet").mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(root / "parquet" / f"{name}.parquet"))
        (root / "jsonl").mkdir(exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "jsonl" / f"{name}.jsonl").write_text(lines)
    return root


@pytest.fixture
def arguments(tiny, tokenizer_json, directory, tmp_path):
    """A function from (workdir, changed keys) to the arguments of a tiny run with the real tokenizer.json."""

    def make(workdir, **changes):
        common = {"data.cache_dir": tmp_path / "tokens", "data.tokenizer": tokenizer_json, "data.held_out_percent": 20}
        return tiny(workdir, **common | changes)

    return make


SOURCES = {
    "parquet dataset": {"data.source": "huggingface", "data.dataset": "parquet", "data.held_out_split": "validation"},
    "jsonl stream": {
        "data.source": "huggingface", "data.dataset": "jsonl", "data.streaming": True, "data.held_out_documents": 5,
        "data.shuffle_rows": 8,
    },
    "jsonl stream, one document a row": {
        "data.source": "huggingface", "data.dataset": "jsonl", "data.streaming": True, "data.packing": "documents",
        "data.held_out_split": "validation", "data.shuffle_rows": 8,
    },
    "corpus, one document a row": {"data.packing": "documents"},
    "jsonl files, one document a row": {
        "data.source": "files", "data.paths": "jsonl/train*", "data.packing": "documents",
    },
}  # fmt: skip


@exhaustive("test_stream.py, where every position continues; test_loop.py and test_faults.py, where runs resume")
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_goes_through_and_resumes_bit_for_bit(arguments, directory, tmp_path, source, capsys, same_end):
    changes = dict(SOURCES[source])
    for key in ("data.dataset", "data.paths"):
        if key in changes:
            changes[key] = directory / changes[key]
    whole = tmp_path / "whole"
    assert main(arguments(whole, **changes)) == 0
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    for step in (8, 12):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    assert main(arguments(resumed, **changes)) == 0
    assert "step 4 of 12" in capsys.readouterr().out
    same_end(resumed, whole, 12)

    identity = json.loads((whole / "corpus.json").read_text())
    if "stream" not in source:
        documents = {"parquet dataset": 67, "corpus, one document a row": 40}.get(source, 60)
        assert identity["train_documents"] + identity["held_out_documents"] == documents
    assert ("held_out_tokens_cut_off" in identity) == ("one document" in source)
    record = read_metrics(whole / "metrics.jsonl")[-1]
    # 400 tokens for 256 bytes: a token is more than a byte.
    assert record["eval/bits_per_byte"] < 0.8 * record["eval/loss"] / 0.6931
    config = json.loads((whole / "config.json").read_text())
    tokenizer = load_kept_tokenizer(config["data"], whole)
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert (whole / "sample.txt").read_text().startswith("def ")
