"""`python -m train.generate` on a run that has just been trained: text, figures, mistakes, interrupts."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from support.exhaustive import exhaustive

from train import generate as program
from train.data.documents import find_inputs, read_documents
from train.data.tokenizers import load_tokenizer
from train.generate import Stream, load, main
from train.keyboard import InterruptRequest

LONG = ("--max_new_tokens", "64", "--fold_size", "4")  # two blocks of one compiled program, which most tests share


def generate(capsys, workdir, *options, status=0):
    capsys.readouterr()
    assert main(["--workdir", str(workdir), *options]) == status
    return capsys.readouterr()


def test_continues_a_prompt(capsys, finished, tmp_path, monkeypatch):
    """The same text for the same seed, from the command line, a file and standard input."""
    options = LONG
    first = generate(capsys, finished, "--prompt", "def f", *options)
    assert re.fullmatch(r"\d+ tokens, .*; cache [\d.]+ MiB\n", first.err)
    (tmp_path / "prompt").write_text("def f")
    assert generate(capsys, finished, "--prompt_file", str(tmp_path / "prompt"), *options).out == first.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def f")))
    assert generate(capsys, finished, "--prompt_file", "-", *options).out == first.out
    assert generate(capsys, finished, "--prompt", "def f", *options, "--seed", "1").out != first.out
    assert generate(capsys, finished, "--prompt", "def f", *options, "--checkpoint", "latest").out
    two = generate(capsys, finished, "--prompt", "def f", *options, "--num_samples", "2").out
    assert two.startswith(f"--- sample 1\n{first.out}--- sample 2\n")


def test_what_a_prompt_begins_with(sentencepiece_model):
    """The token that opens a document; where there is none, an empty prompt stands behind the document before."""
    for spec, text, expected in (
        (str(sentencepiece_model), "", lambda one: [one.bos_id]),
        (str(sentencepiece_model), "x", lambda one: [one.bos_id, *one.encode("x")]),
        ("bytes", "", lambda one: [one.eos_id]),
        ("bytes", "x", lambda one: [ord("x")]),
    ):
        tokenizer = load_tokenizer(spec)
        options = program.parse(["--workdir", "run", "--prompt", text])
        assert program.prompt_tokens(options, tokenizer).tolist() == expected(tokenizer)


def test_a_prompt_file_has_the_tokens_that_training_sees(tmp_path, monkeypatch):
    content = b"\xef\xbb\xbfa\r\nb\rc\x85\xff\n"
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    ((_, text),) = read_documents(find_inputs("data.paths", str(path)), "text")
    tokenizer = load_tokenizer("bytes")
    for name in (str(path), "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        options = program.parse(["--workdir", "run", "--prompt_file", name])
        tokens = program.prompt_tokens(options, tokenizer).tolist()
        assert bytes(tokens) == content[3:]
        assert tokens == tokenizer.encode(text).tolist()


def test_mistakes_are_one_line(capsys, finished, tmp_path):
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    for copy in (empty, foreign):
        shutil.copytree(finished, copy)
    shutil.rmtree(empty / "checkpoints")
    corpus = json.loads((foreign / "corpus.json").read_text())
    (foreign / "corpus.json").write_text(json.dumps(corpus | {"tokenizer": "another"}))
    (tmp_path / "utf-16").write_text("x", encoding="utf-16")
    prompt = ("--prompt", "x")
    for workdir, options, message in (
        (tmp_path / "none", prompt, "there is no run in"),
        (empty, prompt, "there is no checkpoint in"),
        (foreign, prompt, "was trained with one of digest another, its tokenizer file has bytes"),
        (finished, (), "one of the arguments --prompt --prompt_file is required; see --help"),
        (finished, ("--prompt_file", str(tmp_path / "none")), "cannot read --prompt_file"),
        (finished, ("--prompt_file", str(tmp_path / "utf-16")), "utf-16 is UTF-16: convert it to UTF-8"),
        (finished, (*prompt, "--temperature", "-1"), "temperature=-1.0 must be at least 0"),
        (finished, (*prompt, "--top_p", "0"), "top_p=0.0 must be above 0 and at most 1"),
        (finished, (*prompt, "--top_p", "1.5"), "top_p=1.5 must be above 0 and at most 1"),
        (finished, (*prompt, "--max_new_tokens", "0"), "--max_new_tokens=0 and --num_samples=1 must be at least 1"),
    ):
        error = generate(capsys, workdir, *options, status=2).err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


def test_an_interrupt_keeps_what_is_there(capsys, finished, monkeypatch):
    """The block under way too: an exception could land where Python drops it."""
    whole = generate(capsys, finished, "--prompt", "def f", *LONG).out
    decode, calls = program.decode, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return decode(*args, **options)

    monkeypatch.setattr(program, "decode", interrupted)
    got = generate(capsys, finished, "--prompt", "def f", *LONG, status=130)
    assert len(got.out) > 1
    assert whole.startswith(got.out[:-1].rstrip("\N{REPLACEMENT CHARACTER}"))
    assert got.err.startswith("32 tokens, ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_with_nothing_to_keep_ends_at_once(capfd, monkeypatch):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with InterruptRequest() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert (statuses, interruption.requested) == ([130], False)
        interruption.keeps = True
        signal.raise_signal(signal.SIGINT)
        assert (statuses, interruption.requested) == ([130], True)
        signal.raise_signal(signal.SIGINT)
    assert statuses == [130, 130]
    assert capfd.readouterr().err == "interrupted\n" * 2


def test_a_run_with_kernels_generates_where_there_are_none(capsys, finished, tmp_path):
    options = ("--prompt", "def f", *LONG)
    want = generate(capsys, finished, *options).out
    kernels = tmp_path / "kernels"
    shutil.copytree(finished, kernels)
    config = json.loads((kernels / "config.json").read_text())
    config["execution"]["implementation"] = "mosaic_gpu"
    (kernels / "config.json").write_text(json.dumps(config))
    assert generate(capsys, kernels, *options).out == want
    error = generate(capsys, kernels, *options, "--implementation", "mosaic_gpu", status=2).err
    assert "implementation='mosaic_gpu' cannot compute this call: it needs a Hopper GPU" in error
    assert error.count("\n") == 1
    assert load(finished, "best", "xla")[0].execution.implementation == "xla"


def test_a_closed_pipe_ends_in_one_line(capsys, finished, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["--workdir", str(finished), "--prompt", "def f", *LONG]) == 141
    monkeypatch.undo()
    assert capsys.readouterr().err == "stopped: nobody reads standard output any more\n"


def test_a_character_that_stdout_lacks_is_an_escape(capsys, finished, monkeypatch):
    options = ("--prompt", "def f", *LONG)
    want = generate(capsys, finished, *options).out
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["--workdir", str(finished), *options]) == 0
    assert not want.isascii()
    assert out.buffer.getvalue() == want.encode("ascii", "backslashreplace")


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = program.parse(["--workdir=~/run", "--prompt_file=~/prompt"])
    assert (str(options.workdir), options.prompt_file) == ("/home/me/run", "/home/me/prompt")


def test_half_a_character_waits_for_the_other():
    out = io.StringIO()
    stream = Stream(load_tokenizer("bytes"), out)
    euro = list("x\N{EURO SIGN}".encode())
    stream.write(euro[:2])
    assert out.getvalue() == "x"
    stream.write(euro[2:])
    assert out.getvalue() == "x\N{EURO SIGN}"
    stream.write(euro[1:2])
    stream.finish()
    assert out.getvalue() == "x\N{EURO SIGN}\N{REPLACEMENT CHARACTER}\n"


@exhaustive("the tests above, which call what it calls, and test_package.py, which starts it")
@pytest.mark.parametrize("module", ["twomamba_jax.generate", "train.generate"])
def test_the_module_runs(finished, compilation_cache, module):
    """The second is what the first calls."""
    command = [sys.executable, "-m", module, "--workdir", str(finished), "--prompt", "def f", *LONG]
    environment = os.environ | {key.upper(): str(value) for key, value in compilation_cache.items()}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    done = subprocess.run(command, **options)
    assert re.match(r"\d+ tokens, ", done.stderr)
    assert "Warning" not in done.stderr
