"""`benchmarks/forms.py` at tiny sizes: what it measures, refuses and writes."""

import importlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.exhaustive import EXHAUSTIVE, exhaustive

SIZES = ["--heads", "2", "--head-dim", "4"]


@pytest.fixture
def forms(monkeypatch):
    """The script as a module, which times everything three times only."""
    module = importlib.import_module("forms")
    monkeypatch.setattr(module, "BUDGET_SECONDS", 0.0)
    return module


def row_of(forms, form, direction="forward", score="squared", tokens=40):
    return forms.Row(score, tokens, 2, 4, form, direction)


def measured(forms, row, limit=2**30):
    arrays = forms.make_arrays(row.score, row.tokens, row.heads, row.head_dim)
    return forms.measure(row, arrays, forms.make_check(row.score, arrays), limit)


@exhaustive("test_attention.py, whose table and plot are alike, and the figures' own tests below")
def test_writes_a_table_the_figures_and_a_plot(forms, tmp_path, capsys):
    out = tmp_path / "new" / "figure"
    assert forms.main([*SIZES, "--lengths", "40", "--out", str(out)]) == 0

    report = json.loads(Path(f"{out}.json").read_text())
    assert report["versions"].keys() >= {"jax", "jaxlib", "twomamba-jax"}
    assert report["device"]["kind"]
    rows = report["rows"]
    expected = [(40, "forward", form) for form in ("parallel", "chunked", "recurrent")]
    assert [(r["tokens"], r["direction"], r["form"]) for r in rows] == expected
    for row in rows:
        assert (row["batch"], row["heads"], row["head_dim"], row["dtype"]) == (1, 2, 4, "float32")
        assert row["milliseconds"] > 0
        assert row["runs"] == 3
        assert 0 < row["error_over_bound"] <= 1
        # y at least, 4 bytes a number; the recurrent form holds a state per token on top of it.
        states = row["tokens"] * 2 * (10 * 4 + 10) * 4 if row["form"] == "recurrent" else 0
        assert row["bytes"] >= row["tokens"] * 2 * 4 * 4 + states
        assert not row["note"]

    lines = capsys.readouterr().out.splitlines()
    header = "| T | parallel, ms | chunked, ms | recurrent, ms | parallel, MiB | chunked, MiB | recurrent, MiB | "
    assert lines.count(header + "chunked, KiB per token |") == 1
    (cells,) = (line.split(" | ") for line in lines if line.startswith("| 40 |"))
    assert [f"{r['milliseconds']:.1f}" for r in rows] == cells[1:4]
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


@exhaustive("test_writes_a_table_the_figures_and_a_plot, in which outputs pass their check")
@pytest.mark.parametrize(
    ("form", "score"),
    [("chunked", "squared"), ("chunked", "exp"), ("parallel", "squared"), ("chunked", "linear")],
)
def test_outputs_and_gradients_of_several_chunks_pass_their_check(forms, score, form):
    """Over more tokens than a chunk has, but for `exp`, and more than the rows that are checked."""
    row = measured(forms, row_of(forms, form, "forward+backward", score, tokens=300))
    assert not row.note
    assert row.error_over_bound <= 1


@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
def test_its_definition_is_the_oracles(forms, score):
    arrays = [np.asarray(x) for x in forms.make_arrays(score, 30, 2, 4)]
    rows = np.array([0, 7, 29])
    want, _ = oracle.forward(*arrays[:4], score=score, normalize=True)
    (y, fixed), kappa = forms.definition(score, *map(jnp.asarray, arrays[:4]), rows)
    np.testing.assert_allclose(y, want[:, rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y, fixed)
    if score == "squared":
        np.testing.assert_allclose(kappa[..., 0], oracle.kappa(*arrays[:2], arrays[3])[:, rows], rtol=1e-3)


@pytest.mark.parametrize(
    ("direction", "wrong"),
    [
        ("forward", lambda q, k, v, log_decay: (q, k, v, 1.01 * log_decay)),
        ("forward", lambda q, k, v, log_decay: (q, k, v.at[0, 3].set(jnp.nan), log_decay)),
        ("forward+backward", lambda q, k, v, log_decay: (q, k, v, 1.01 * log_decay)),
    ][: None if EXHAUSTIVE else 1],
)
def test_does_not_time_what_is_wrong(forms, monkeypatch, tmp_path, capsys, direction, wrong):
    right = forms.decay_attention
    monkeypatch.setattr(forms, "decay_attention", lambda *x, **options: right(*wrong(*x), **options))
    row = measured(forms, row_of(forms, "chunked", direction))
    assert row.note.startswith("fails its check")
    assert row.milliseconds is None
    assert forms.main([*SIZES, "--lengths", "40", "--forms", "chunked", "--out", str(tmp_path / "f")]) == 1
    assert "fails its check" in capsys.readouterr().out


def test_does_not_run_what_does_not_fit(forms):
    states = 40 * 2 * (10 * 4 + 10) * 4  # T H (D V + D) float32
    row = measured(forms, row_of(forms, "recurrent"), limit=states - 1)
    assert row.note == "does not fit: 0.0 GiB of states"
    assert row.bytes is None
    row = measured(forms, row_of(forms, "recurrent"), limit=states)
    assert row.note.startswith("does not fit: 0.0 GiB of states, 0.0 GiB in all")
    assert row.bytes > states
    assert row.milliseconds is None
    assert measured(forms, row_of(forms, "parallel"), limit=4 * 2 * 40**2 - 1).note.endswith("of weights")


@exhaustive("test_does_not_run_what_does_not_fit")
def test_a_form_ends_where_it_no_longer_fits(forms, tmp_path, capsys):
    """The T^2 weights of 160 tokens and two heads take 200 KiB, those of 20 tokens 3 KiB."""
    limit = str(100 / 2**20)
    arguments = [*SIZES, "--lengths", "160,20,320", "--forms", "parallel", "--memory-limit", limit]
    assert forms.main([*arguments, "--out", str(tmp_path / "f")]) == 0
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(r["tokens"], r["note"]) for r in rows] == [(20, ""), (160, "does not fit: 0.0 GiB of weights")]
    lines = capsys.readouterr().out.splitlines()
    assert "| 160 | does not fit: 0.0 GiB of weights |  |" in lines
    assert not any(line.startswith("| 320") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "16,x"], "--lengths 16,x: expected integers with commas between them"),
        (["--lengths", "1,16"], "--lengths above 1"),
        (["--heads", "0"], "must be above 0"),
        (["--memory-limit", "-2"], "must be above 0"),
        (["--forms", "serial"], "--forms serial: the score squared has parallel, chunked, recurrent"),
        (["--forms", "recurrent", "--score", "exp"], "--forms recurrent: the score exp has parallel, chunked"),
        (["--score", "cubic"], "--score"),
        (["--out", "/dev/null/forms"], "--out /dev/null/forms: "),
    ],
)
def test_says_what_is_wrong_with_the_command_line(forms, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        forms.parse(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
