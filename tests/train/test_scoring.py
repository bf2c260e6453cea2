"""Log likelihoods and continuations of many requests, and the harness that asks for them."""

import json
import sys

import jax
import numpy as np
import pytest
from support.exhaustive import exhaustive
from support.models import model_of, params_of

from train.data.tokenizers import load_tokenizer
from train.evaluate import main
from train.scoring import Scorer
from twomamba_jax import generate

CONTEXTS = [[5, 4, 3], [1], [7] * 9]
PAIRS = [([22], [1, 2, 3]), ([5, 4, 3], [2]), ([5, 4, 3], [7, 7]), ([5, 4, 3], []), (list(range(11)), [0, 9])]


@pytest.fixture(scope="module")
def scorer():
    model = model_of("softmax")
    return Scorer(model, params_of(model), load_tokenizer("ids:23", "22"), rows=2, max_length=16)


@pytest.fixture(scope="module")
def logits_of(scorer):
    """A function from tokens to the log probabilities of what follows each: one padded shape for all."""
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(scorer.model.apply({"params": scorer.params}, tokens)[0]))
    return lambda tokens: np.asarray(apply(np.array([[*tokens, *[0] * (32 - len(tokens))]])))[: len(tokens)]


@pytest.fixture(scope="module")
def generated(scorer):
    """Of each of CONTEXTS the five tokens that the model itself generates."""
    tokens = np.zeros((3, 9), np.int32)
    for row, context in zip(tokens, CONTEXTS):
        row[: len(context)] = context
    options = {"lengths": np.array(list(map(len, CONTEXTS))), "max_new_tokens": 5}
    return generate(scorer.model, scorer.params, tokens, **options).tokens.tolist()


def likelihood(logits_of, context, continuation):
    rows = logits_of([*context, *continuation])[len(context) - 1 : -1]
    chosen = rows[np.arange(len(continuation)), continuation]
    return chosen.sum(), bool((rows.argmax(-1) == continuation).all())


def test_loglikelihoods_are_the_logits(scorer, logits_of):
    found = scorer.loglikelihoods(PAIRS)
    for (total, greedy), (context, continuation) in zip(found, PAIRS):
        expected, same = likelihood(logits_of, context, continuation) if continuation else (0.0, True)
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert greedy == same


def test_request_in_another_batch_has_the_same_number(scorer):
    together = scorer.loglikelihoods(PAIRS)
    assert [scorer.loglikelihoods([pair])[0] for pair in PAIRS] == together
    assert scorer.loglikelihoods(PAIRS[::-1])[::-1] == together


def test_greedy_continuation_is_found_greedy(scorer, generated):
    context, greedy = CONTEXTS[0], generated[0]
    assert scorer.loglikelihoods([(context, greedy)])[0][1]
    other = [*greedy[:4], (greedy[4] + 1) % 23]
    assert not scorer.loglikelihoods([(context, other)])[0][1]


def test_rolling_predicts_each_token_once(scorer, logits_of):
    """Within a window, all of it; beyond, windows of which the last reaches back."""
    tokens = [number * number % 22 for number in range(20)]
    expected, _ = likelihood(logits_of, [22], tokens[:16])
    assert scorer.rolling(tokens[:16]) == pytest.approx(expected, rel=1e-5)
    rest, _ = likelihood(logits_of, tokens[3:16], tokens[16:])
    assert scorer.rolling(tokens) == pytest.approx(expected + rest, rel=1e-5)


@exhaustive("test_loglikelihoods_are_the_logits, and tests/test_generate.py: rows that stop")
def test_continuations_stop_at_a_string(scorer, generated):
    """Each is the model's own generation, cut at its first stop string, whatever else is in the batch."""
    end = scorer.tokenizer.eos_id
    expected = [scorer.tokenizer.decode([*tokens, end][: [*tokens, end].index(end)]) for tokens in generated]
    found = scorer.continuations(CONTEXTS, (), 5)
    assert [text.split() for text in found] == [text.split() for text in expected]
    assert len(found[0].split()) == 5
    word = found[0].split()[1]
    stopped = scorer.continuations(CONTEXTS, (f" {word}",), 5)
    assert stopped == [text[: text.find(f" {word}")] if f" {word}" in text else text for text in found]


def test_harness_runs_a_local_task(finished, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    documents = [{"text": "def f(x):", "choices": [" return", " 12"], "label": 0}] * 2
    (tmp_path / "data.json").write_text("".join(json.dumps(one) + "\n" for one in documents))
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.json")}},
    }
    tasks = {
        "toy_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
        },
        "toy_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "toy_generate": {
            "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))  # JSON is YAML
    options = ["--tasks", ",".join(tasks), "--include_path", str(tmp_path), "--json"]
    assert main(["--workdir", str(finished), *options]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert results["toy_choice"]["acc,none"] in (0.0, 1.0)
    assert 1 < results["toy_rolling"]["byte_perplexity,none"] < 1000
    assert results["toy_generate"]["exact_match,none"] == 0.0
    assert main(["--workdir", str(finished), "--tasks", "toy_nothing"]) == 2
    assert "--tasks: lm_eval knows no toy_nothing" in capsys.readouterr().err


def test_tasks_without_the_harness_are_refused(finished, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["--workdir", str(finished), "--tasks", "toy"]) == 2
    assert "pip install 'twomamba-jax[eval]'" in capsys.readouterr().err
