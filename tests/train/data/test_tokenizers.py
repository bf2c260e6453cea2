"""Tokenizers: what comes back, what is special, and a run's own copy of its tokenizer."""

import json

import numpy as np
import pytest
import tokenizers

from train.data.tokenizers import keep_tokenizer, load_kept_tokenizer, load_tokenizer
from train.errors import UserError, import_extra

TEXT = "def f(x):\n    return 'é ☃ \t' # </s> <|endoftext|> <s>\n\n"


@pytest.fixture(params=["bytes", "tokenizer_json", "sentencepiece_model"])
def spec(request) -> str:
    return "bytes" if request.param == "bytes" else str(request.getfixturevalue(request.param))


def test_text_comes_back_and_special_tokens_are_not_in_it(spec):
    tokenizer = load_tokenizer(spec)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == TEXT
    for one, text in zip(tokenizer.encode_batch([TEXT, "", "x"]), [TEXT, "", "x"], strict=True):
        assert tokenizer.decode(one) == text
        assert np.array_equal(one, tokenizer.encode(text))


def test_special_ids_are_dropped_and_foreign_ones_shown(spec):
    tokenizer = load_tokenizer(spec)
    ids = tokenizer.encode("def")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "def"
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, *ids]) == "def\ufffddef"
    snowman = tokenizer.encode("☃")
    assert "\ufffd" in tokenizer.decode(snowman[:-1])  # a character cut in two, in all three


def test_what_is_special_in_each(tokenizer_json, sentencepiece_model):
    assert (load_tokenizer("bytes").eos_id, load_tokenizer("bytes").bos_id) == (256, None)
    bpe, llama = load_tokenizer(str(tokenizer_json)), load_tokenizer(str(sentencepiece_model))
    assert (bpe.vocab_size, bpe.eos_id, bpe.bos_id) == (400, 0, None)
    assert (llama.vocab_size, llama.eos_id, llama.bos_id) == (300, 2, 1)
    assert bpe.encode(TEXT).size < len(TEXT.encode())
    named = load_tokenizer(str(tokenizer_json), eos_token="!", bos_token='"')
    assert (named.eos_id, named.bos_id) == (bpe.encode("!")[0], bpe.encode('"')[0])
    assert len({bpe.digest, llama.digest, named.digest}) == 3


def test_bytes_that_are_no_utf_8(tokenizer_json):
    text = b"a\nb\xff\xfe".decode("utf-8", "surrogateescape")
    assert load_tokenizer("bytes").encode(text).tolist() == [97, 10, 98, 255, 254]
    assert load_tokenizer("bytes").decode([97, 255, 98]) == "a\ufffdb"
    with pytest.raises(UserError, match=r"not UTF-8 \(in its line 2\), which bpe.json cannot encode"):
        load_tokenizer(str(tokenizer_json)).encode(text)


@pytest.mark.parametrize("setting", ["truncation", "padding", "dropout"])
def test_what_a_tokenizer_json_carries_from_its_training_is_off(setting, tmp_path, tokenizer_json):
    whole, path = load_tokenizer(str(tokenizer_json)), tmp_path / "bpe.json"
    altered = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    if setting == "truncation":
        altered.enable_truncation(max_length=8)
    elif setting == "padding":
        altered.enable_padding(pad_id=0, pad_token="<|endoftext|>", length=500)
    else:
        altered.model.dropout = 0.5
    altered.save(str(path))
    tokenizer = load_tokenizer(str(path))
    texts = [TEXT * 20, "def"]
    for one, expected in zip(tokenizer.encode_batch(texts), whole.encode_batch(texts), strict=True):
        assert np.array_equal(one, expected)
    # A run or a cache of the tokens of before is another one; a model that learnt from them knows the same tokens.
    file_digest, _, off = tokenizer.digest.partition(" ")
    assert off == f"without {setting}"
    (tmp_path / "corpus.json").write_text(json.dumps({"tokenizer": file_digest}))
    keep_tokenizer(str(path), tmp_path)
    data = {"tokenizer": str(path), "eos_token": None, "bos_token": None}
    assert load_kept_tokenizer(data, tmp_path).digest == tokenizer.digest


def test_a_tilde_in_the_path_of_a_tokenizer(tmp_path, monkeypatch, tokenizer_json):
    monkeypatch.setenv("HOME", str(tokenizer_json.parent))
    assert load_tokenizer("~/bpe.json").vocab_size == 400
    keep_tokenizer("~/bpe.json", tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer_json.read_bytes()
    with pytest.raises(UserError, match=r"there is no tokenizer file '~nobody-of-this-name/bpe.json'"):
        load_tokenizer("~nobody-of-this-name/bpe.json")


def test_what_is_no_tokenizer_is_refused(tmp_path, tokenizer_json):
    for name, message in (("none.json", "there is no tokenizer file"), ("words.txt", "must be 'bytes', a tokenizer")):
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / name))
    for name, message in (("cut.json", "is no tokenizer.json"), ("cut.model", "is no SentencePiece model")):
        (tmp_path / name).write_bytes(tokenizer_json.read_bytes()[:100])
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path / name))
    with pytest.raises(UserError, match=r"has no token '<nope>': set data.eos_token"):
        load_tokenizer(str(tokenizer_json), eos_token="<nope>")
    with pytest.raises(UserError, match=r"has no token '<nope>': set data.bos_token"):
        load_tokenizer(str(tokenizer_json), bos_token="<nope>")


def test_a_missing_extra_is_named():
    with pytest.raises(UserError, match=r"needs the package 'no_such_package' .* pip install 'twomamba-jax\[data\]'"):
        import_extra("no_such_package", "data")


def test_a_run_keeps_its_own_tokenizer(spec, tmp_path, tokenizer_json):
    tokenizer = load_tokenizer(spec)
    (tmp_path / "corpus.json").write_text(json.dumps({"tokenizer": tokenizer.digest}))
    keep_tokenizer(spec, tmp_path)
    data = {"tokenizer": spec if spec == "bytes" else f"/gone{spec}", "eos_token": None, "bos_token": None}
    kept = load_kept_tokenizer(data, tmp_path)
    assert np.array_equal(kept.encode(TEXT), tokenizer.encode(TEXT))
    (tmp_path / "corpus.json").write_text(json.dumps({"tokenizer": "another"}))
    with pytest.raises(UserError, match="tokenizer mismatch"):
        load_kept_tokenizer(data, tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer: its data\.source='recall' is no text"):
        load_kept_tokenizer({"source": "recall"}, tmp_path)
    (tmp_path / "corpus.json").unlink()
    with pytest.raises(UserError, match="does not say which tokenizer"):
        load_kept_tokenizer(data, tmp_path)
