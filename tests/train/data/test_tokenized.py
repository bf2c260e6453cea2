"""Tokenised documents: what a split holds, and a cache that is made once, whole, and never believed when damaged."""

import resource

import numpy as np
import pytest

from train.data.rows import PackedRows
from train.data.tokenized import open_cache, tokenize_in_memory
from train.data.tokenizers import load_tokenizer
from train.errors import UserError

DOCUMENTS = [(number % 4 == 3, f"document {number} é " * (number % 5 + 1)) for number in range(1100)]


@pytest.fixture(params=["bytes", "sentencepiece_model"])
def tokenizer(request):
    spec = request.param
    return load_tokenizer("bytes" if spec == "bytes" else str(request.getfixturevalue(spec)))


@pytest.fixture
def cache(tmp_path, tokenizer):
    """A function that opens the cache, with what it reported and how often documents were asked for."""

    def opened(key=None, documents=DOCUMENTS):
        asked = []
        splits = open_cache(
            tmp_path / "tokens", key or {"inputs": "d"}, lambda: asked.append(1) or documents, tokenizer, told.append
        )
        return splits, len(asked)

    told = opened.told = []
    return opened


def contents(split):
    return [split.tokens[start:end].tolist() for start, end in zip(split.starts[:-1], split.starts[1:])]


def test_documents_stand_between_their_special_tokens(tokenizer):
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for split, held_out in zip(tokenize_in_memory(DOCUMENTS, tokenizer), (False, True)):
        texts = [text for belongs, text in DOCUMENTS if belongs == held_out]
        assert contents(split) == [[*opening, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        targets = sum(len(document) - 1 for document in contents(split))
        assert split.targets_per_byte == targets / split.num_bytes
        assert (tokenizer.name == "bytes") == (split.targets_per_byte == 1)


def test_the_cache_holds_what_memory_would_and_is_made_once(cache, tokenizer):
    splits, asked = cache()
    assert asked == 1
    for cached, expected in zip(splits, tokenize_in_memory(DOCUMENTS, tokenizer)):
        assert contents(cached) == contents(expected)
        assert cached.num_bytes == expected.num_bytes
    again, asked = cache()
    assert asked == 0
    assert contents(again[0]) == contents(splits[0])
    assert [line.split(" /")[0] for line in cache.told] == ["tokenising into", "tokens from"]
    _, asked = cache(key={"inputs": "other"})
    assert asked == 1


@pytest.mark.parametrize("name", ["cache.json", "train.tokens", "held_out.tokens", "train.starts.npy"])
def test_a_damaged_cache_is_said_and_made_again(cache, tmp_path, name):
    cache()
    (path,) = (tmp_path / "tokens").glob(f"*/{name}")
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        cache.told.clear()
        _, asked = cache()
        assert asked == 1 or (name == "cache.json" and damaged is not None and len(damaged) == len(whole))
        assert asked == 0 or "is unreadable" in cache.told[0]
    assert cache()[1] == 0
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_a_cache_that_shrinks_under_the_run_is_a_clear_error(cache, tmp_path):
    (train, _), _ = cache()
    rows = PackedRows(train, 64, 0)
    last = len(rows) - 2
    rows[last]
    (path,) = (tmp_path / "tokens").glob("*/train.tokens")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train\.tokens has shrunk under the run"):
        rows[last]


def test_a_full_disk_leaves_no_half_of_a_cache(cache, tmp_path, tokenizer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write the token cache .*: File too large; set data.cache_dir"):
            cache()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_an_error_in_the_middle_leaves_no_half_of_a_cache(cache, tmp_path):
    def broken():
        yield from DOCUMENTS
        raise UserError("a.jsonl line 7 is not JSON")

    with pytest.raises(UserError, match="line 7"):
        cache(documents=broken())
    assert list((tmp_path / "tokens").iterdir()) == []


def test_ids_above_65535_are_kept(tmp_path):
    class Wide:
        name, digest, vocab_size, bos_id, eos_id = "wide", "wide", 70_000, None, 69_999

        def encode_batch(self, texts):
            return [np.array([69_000, 5], np.int32) for _ in texts]

    train, _ = open_cache(tmp_path, {}, lambda: [(False, "x")], Wide(), lambda _: None)
    assert train.tokens[0:3].tolist() == [69_000, 5, 69_999]
