"""benchmarks/decode.py: what it writes, what it refuses to time, and how it shows several runs as one."""

import dataclasses
import json

import pytest
from support.exhaustive import exhaustive

from benchmarks import decode

OPTIONS = ["--size", "tiny", "--dtype", "float32", "--tokens", "4", "--runs", "1", "--fold_sizes", "2"]
OPTIONS += ["--state_dtypes", "float32", "--batches", "1"]
VARIANTS = ["--variants", "linear", "softmax"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(decode, "COPY_BYTES", 2**16)
    monkeypatch.setattr(decode, "WARM_UP_SECONDS", 0.0)


@exhaustive("test_cache.py, in which steps are the full pass, and below what a failed check does")
def test_the_check_compares_with_float32(monkeypatch):
    options, row = decode.parse([*OPTIONS, *VARIANTS]), decode.Row("softmax", None, "float32", 1, 8)
    params = decode.init_params(decode.model_of("softmax", options, None))
    assert decode.check(row, options, params) < 1e-3

    def changed(variant, options, implementation, precision=None):
        model = model_of(variant, options, implementation, precision)
        config = dataclasses.replace(model.config, norm_eps=1.0 if precision == "highest" else model.config.norm_eps)
        return model.clone(config=config)

    model_of = decode.model_of
    monkeypatch.setattr(decode, "model_of", changed)
    assert decode.check(row, options, params) > 1e-2


@exhaustive("test_times_nothing_that_fails_its_check_or_does_not_fit, which writes one too")
def test_writes_a_table_the_figures_and_a_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "check", lambda *args: 5e-4)
    out = tmp_path / "figures"
    assert decode.main([*OPTIONS, *VARIANTS, "--contexts", "8", "64", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["variant"], row["context"]) for row in rows] == [
        (variant, context) for variant in VARIANTS[1:] for context in (8, 64)
    ]
    assert all(row["milliseconds"] > 0 and row["error"] == 5e-4 for row in rows)
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] == 4 * 2 * 2 * (16 * 16 + 16)
    assert rows[3]["state_bytes"] == 8 * rows[2]["state_bytes"] == 4 * 2 * 2 * 64 * 32
    assert out.with_suffix(".png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    again = tmp_path / "again"
    assert decode.main(["--plot", str(out.with_suffix(".json")), "--out", str(again)]) == 0
    assert capsys.readouterr().out in shown
    assert again.with_suffix(".png").exists()


def test_times_nothing_that_fails_its_check_or_does_not_fit(tmp_path, monkeypatch):
    out = tmp_path / "figures"
    checked = []
    monkeypatch.setattr(decode, "check", lambda row, *args: checked.append(row.variant) or 0.5)
    arguments = [*OPTIONS, *VARIANTS, "--contexts", "8", "16", "--out", str(out)]
    assert decode.main(arguments) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(row["note"], row["milliseconds"]) for row in rows] == [("failed its check: 5.0e-01", None)] * 4
    assert checked == ["linear", "softmax"]  # once for all contexts
    assert decode.main([*arguments, "--memory", "1e-6"]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["rows"][0]["note"] == "needs more than 0 GiB"
