"""`benchmarks/attention.py` on the CPU at tiny sizes: what it selects, checks, refuses, derives and writes."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.exhaustive import EXHAUSTIVE, exhaustive

from pallas_kernels.chunked.crossovers import TABLE, Crossover
from twomamba_jax import decay_attention

PATH = Path(__file__).parents[2] / "benchmarks" / "attention.py"
SIZES = ["--tokens", "20", "40", "--xla_tokens", "40", "--total", "80", "--heads", "4", "--kv_heads", "2"]
SMALL = [*SIZES, "--head_dim", "8", "--scores", "squared", "--rows", "xla", "--seed", "7"]
CEILINGS = {"tflops": 500.0, "terabytes_per_second": 3.0}


@pytest.fixture
def attention(monkeypatch):
    """The script as a module whose ceilings, prior checks and rounds are small."""
    module = importlib.import_module("attention")
    module.refusal.cache_clear()
    short = dict.fromkeys(module.ATTENTIONS, 15)
    for name, value in (("SHORT_TOKENS", short), ("CEILING_SIZE", 16), ("ROUND_SECONDS", 0.0)):
        monkeypatch.setattr(module, name, value)
    return module


def row_of(attention, direction, score="squared", **changes):
    sizes = {"tokens": 150, "batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "decay": -0.02}
    return attention.Row("xla", score, direction, **(sizes | changes))


def prepared(attention, row, **changes):
    return attention.prepare(row, seed=3, limit=2**30, **changes)[0]


def test_selects_every_length_and_direction_and_xla_where_asked(attention, tmp_path):
    options = attention.parse(["--out", str(tmp_path / "a")])
    rows = list(attention.rows_of(options))
    # Softmax, three quadratic scores and two in chunks at 8 lengths both ways and at one forward; XLA's three at 3.
    assert len(rows) == (8 * 2 + 1) * 6 + 3 * 2 * 3
    assert {row.tokens * row.batch for row in rows} == {65536, 131072, 524288}
    assert {row.direction for row in rows if row.tokens > 131072} == {"forward"}
    assert {row.tokens for row in rows if row.attention == "xla"} == {2048, 8192, 131072}
    assert {(row.score, row.decay) for row in rows if row.attention == "cudnn"} == {("exp", None)}
    assert {row.score for row in rows if row.attention == "chunked"} == {"linear", "squared"}
    assert {row.decay for row in rows if row.attention != "cudnn"} == {-2e-3}
    assert [row.label for row in rows[:2]] == ["cuDNN softmax", "linear, quadratic"]

    options = attention.parse(
        [*SMALL, "--total", "30", "--no_decay", "--directions", "both", "--out", str(tmp_path / "a")]
    )
    (row,) = attention.rows_of(options)
    assert row == attention.Row("xla", "squared", "forward+backward", 40, 1, 4, 2, 8, None)


@pytest.mark.parametrize(
    ("name", "form", "implementation"), [("quadratic", "parallel", "mosaic_gpu"), ("chunked", "chunked", "mosaic_gpu")]
)
def test_asks_for_the_kernels_that_a_row_names(attention, monkeypatch, name, form, implementation):
    asked = []
    monkeypatch.setattr("attention_rows.decay_attention", lambda *x, **options: asked.append(options))
    attention.function_of(dataclasses.replace(row_of(attention, "forward"), attention=name))(*range(5))
    assert asked == [{"score": "squared", "form": form, "implementation": implementation}]


def test_writes_a_table_the_figures_and_a_plot(attention, tmp_path, capsys):
    """cuDNN does not run on a CPU: its rows say why, and the others are there all the same."""
    out = tmp_path / "new" / "figure"
    directions = ("forward", "forward+backward") if EXHAUSTIVE else ("forward",)
    chosen = ["--directions", *(["forward", "both"] if EXHAUSTIVE else ["forward"])]
    arguments = [*SMALL, *chosen, "--rows", "cudnn", "xla", "--out", str(out)]
    assert attention.run(attention.parse(arguments), ["python", "x.py", *arguments]) == 0

    report = json.loads(Path(f"{out}.json").read_text())
    assert report["command"].startswith("python x.py --tokens 20 40 ")
    assert report["seed"] == 7
    assert report["device"]
    assert report["versions"].keys() >= {"jax", "jaxlib", "twomamba-jax"}
    assert min(report["ceilings"].values()) > 0
    rows = report["rows"]
    peers = [(t, d, "cuDNN softmax") for t in (20, 40) for d in directions]
    assert [(r["tokens"], r["direction"], r["label"]) for r in rows if r["note"]] == peers
    timed = [r for r in rows if not r["note"]]
    assert [(r["tokens"], r["direction"], r["label"]) for r in timed] == [(40, d, "squared, xla") for d in directions]
    for row in timed:
        assert (row["batch"], row["heads"], row["kv_heads"], row["head_dim"]) == (2, 4, 2, 8)
        assert row["milliseconds"] > 0
        assert row["runs"] == attention.ROUNDS
        assert row["clock"] in ("cupti", "wall")
        assert 0 < row["error_over_bound"] <= 1
        assert 0 < row["temporary_bytes"] < row["peak_bytes"]

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(report["device"])
    assert lines[2].startswith(
        "| T | B | direction | attention | ms | ns/token | TFLOP/s | of ceiling | over cuDNN | error |"
    )
    assert lines[3 + len(rows)].startswith(f"| 40 | 2 | {directions[-1]} | squared, xla | ")
    assert len({line.count("|") for line in lines[2 : 4 + len(rows)]}) == 1
    assert lines[-1].startswith("ceilings: ")
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_crossovers_is_what_was_measured(attention):
    figures = PATH.parents[1] / "docs" / "figures"
    runs = [[figures / f"attention_h100_{name}.json" for name in names] for names in ("ab", ["linear128"])]
    reports = [attention.merged(run) for run in runs]
    found = [entry for report in reports for entry in attention.crossovers_of(report["rows"], report["device"])]
    device = reports[0]["device"]
    assert sorted(map(str, found)) == sorted(str(entry) for entry in TABLE if entry.device == device)


def test_shows_kernels_one_by_one(attention):
    row = attention.Row("chunked", "squared", "forward", 8192, 8, 16, 16, 64, None, 3.0)
    timed = dataclasses.replace(row, kernels={"update": 2.0, "scan": 0.5, "copy": 1e-4})
    (table,) = attention.tables_of_kernels(attention.records_of([row, timed], CEILINGS))
    header = "| squared, chunked, forward, T = 8192 | ms |"
    assert table.splitlines() == [header, "|---|---:|", "| update | 2.000 |", "| scan | 0.500 |"]


def test_derives_flops_and_ratios(attention):
    def row(implementation, direction, milliseconds):
        return attention.Row(implementation, "exp", direction, 8192, 8, 16, 16, 64, None, milliseconds)

    rows = [row("cudnn", "forward", 2.0), row("xla", "forward", 1.0), row("xla", "forward+backward", 7.0)]
    rows.append(row("mosaic_gpu", "forward", None))
    cudnn, forward, both, untimed = attention.records_of(rows, CEILINGS)
    assert forward["nanoseconds_per_token"] == pytest.approx(1e6 / 65536)
    flops = 2 * 8 * 16 * 8192**2 * 64  # forward: 2 B H T^2 K; with the backward's five products 3.5 times that
    assert forward["tflops"] == pytest.approx(flops / 1e-3 / 1e12)
    assert both["tflops"] == pytest.approx(3.5 * flops / 7e-3 / 1e12)
    assert forward["of_ceiling"] == pytest.approx(forward["tflops"] / 500)
    assert (cudnn["over_cudnn"], forward["over_cudnn"]) == (1, 0.5)
    assert "over_cudnn" not in both
    assert "tflops" not in untimed


def report_of(attention, milliseconds: dict[str, list[float]], tokens: list[int]) -> dict:
    """What a run with such times of squared attention forward has written, 65,536 tokens x 16 heads."""
    rows = [
        attention.Row(name, "exp" if name == "cudnn" else "squared", "forward", t, 65536 // t, 16, 16, 64, None, ms)
        for name, times in milliseconds.items()
        for t, ms in zip(tokens, times)
    ]
    report = {"device": "a GPU", "sizes": "16 heads", "versions": {"jax": "1"}, "ceilings": CEILINGS}
    return report | {"rows": attention.records_of(rows, CEILINGS)}


def test_shows_runs_as_one_with_the_ratios_of_each(attention, tmp_path, capsys):
    """And says where the chunked kernels overtake: here half way, in logarithms, from 4096 to 16384."""
    short = report_of(attention, {"cudnn": [1.0], "quadratic": [1.0], "chunked": [2.0]}, [4096])
    long = report_of(attention, {"cudnn": [8.0, 16.0], "quadratic": [4.0, 8.0], "chunked": [2.0, 2.0]}, [16384, 32768])
    paths = [tmp_path / "long.json", tmp_path / "short.json"]
    for path, report in zip(paths, (long, short)):
        path.write_text(json.dumps(report))
    out = tmp_path / "both"
    assert attention.main(["--out", str(out), "--plot", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratios = [(line.split(" | ")[0], line.split(" | ")[8]) for line in lines if "chunked |" in line]
    assert ratios == [("| 4096", "2.000"), ("| 16384", "0.250"), ("| 32768", "0.125")]
    assert lines[-1] == str(Crossover("a GPU", "squared", 64, "forward", 64, 8200))
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("[1]", "expected a JSON file that this script has written"),
        ("{}", "no device"),
        ('{"device": "another", "sizes": "16 heads", "versions": {"jax": "1"}, "rows": []}', "device is another, in "),
    ],
)
def test_refuses_to_show_what_does_not_belong_together(attention, tmp_path, capsys, text, message):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps(report_of(attention, {"cudnn": [1.0]}, [4096])))
    if text:
        other.write_text(text)
    assert attention.main(["--out", str(tmp_path / "a"), "--plot", str(one), str(other)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--plot {other}: ")
    assert message in line


@pytest.mark.parametrize("score", ["linear", "squared", "exp"])
@pytest.mark.parametrize("decay", [True, False])
def test_its_definition_is_the_oracles(attention, score, decay):
    random = np.random.default_rng(0)
    q, k, v, dy = random.normal(size=(4, 30, 8))
    q, k = (abs(q), abs(k)) if score == "linear" else (q, k)
    log_decay = -random.uniform(0, 0.3, size=30) * decay
    rows = np.array([0, 7, 29])
    found = importlib.import_module("attention_check").definition(score, q, k, v, log_decay, dy, rows)

    arrays = [x[None, :, None] for x in (q, k, v, log_decay)]
    cotangent = np.zeros_like(dy)
    cotangent[rows] = dy[rows]
    y, _ = oracle.forward(*arrays, score=score, normalize=True)
    gradients = oracle.gradients(cotangent[None, :, None], None, *arrays, score=score, normalize=True)
    want = [y[0, rows, 0], gradients["q"][0, rows, 0], *(gradients[name][0, :, 0] for name in ("k", "v", "log_decay"))]
    for (value, bound), expected in zip(found, want):
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
        assert (bound > 0).all()


@exhaustive("test_writes_a_table_the_figures_and_a_plot, in which outputs pass, and the definition's own test")
@pytest.mark.parametrize(
    ("score", "every_row"), [("squared", False), ("linear", True), ("exp", False), ("squared", True)]
)
def test_outputs_and_gradients_in_bf16_pass_the_check(attention, score, every_row):
    """More rows than are sampled, and all of them."""
    checked = prepared(attention, row_of(attention, "forward+backward", score), every_row=every_row)
    assert not checked.note
    assert 0.1 < checked.error_over_bound <= 1


def _changed(index, change):
    """The arguments with one of them changed."""
    return lambda right: lambda *x, **options: right(*x[:index], change(x[index]), *x[index + 1 :], **options)


@pytest.mark.parametrize(
    ("direction", "wrong"),
    [
        ("forward", _changed(2, lambda v: v.at[0, 3].set(jnp.nan))),
        ("forward+backward", _changed(1, lambda k: k.at[:, 75].set(jax.lax.stop_gradient(k[:, 75])))),
        ("forward", _changed(1, lambda k: k.at[:, 75].set(0))),
        ("forward", lambda right: lambda *x, **options: right(*x, **options).at[:, -1].multiply(0.9)),
        ("forward+backward", _changed(3, lambda a: 0.8 * a + 0.2 * jax.lax.stop_gradient(a))),
    ][: None if EXHAUSTIVE else 1],
)
def test_refuses_what_is_wrong(attention, monkeypatch, direction, wrong):
    monkeypatch.setattr("attention_rows.decay_attention", wrong(decay_attention))
    checked, program = attention.prepare(row_of(attention, direction), seed=3, limit=2**30, every_row=True)
    assert checked.note.startswith("fails its check: ")
    assert program is None


def test_does_not_time_what_fails_at_short_lengths(attention, monkeypatch, tmp_path, capsys):
    """Which is a failure of the program: the exit status is 1."""
    monkeypatch.setattr(
        "attention_rows.decay_attention",
        lambda *x, **options: (1 + (x[0].shape[1] == 15)) * decay_attention(*x, **options),
    )
    options = attention.parse([*SMALL, "--directions", "forward", "--out", str(tmp_path / "a")])
    assert attention.run(options, []) == 1
    assert "times the bound (T = 15) |" in capsys.readouterr().out
    options.unchecked = True
    assert attention.run(options, []) == 0
    (record,) = json.loads(options.out.with_suffix(".json").read_text())["rows"][:1]
    assert record["milliseconds"]
    assert record["error_over_bound"] is None


def test_tells_runs_that_differ_in_a_bit(attention):
    x = jnp.array([0.0, 1.0, 2.0], jnp.bfloat16)
    assert attention.same_bits([x, None, jnp.ones(3)], [x, None, jnp.ones(3)])
    assert not attention.same_bits([x], [x.at[2].set(2.015625)])
    assert not attention.same_bits([x], [x.at[0].set(-0.0)])


def test_refuses_runs_that_differ(attention, monkeypatch):
    monkeypatch.setattr(attention, "same_bits", lambda first, second: False)
    assert prepared(attention, row_of(attention, "forward")).note == "fails its check: two runs differ"


def test_does_not_run_what_does_not_fit(attention):
    row, program = attention.prepare(row_of(attention, "forward"), seed=3, limit=0)
    assert row.note == "does not fit: 0.0 GiB"
    assert row.temporary_bytes > 0
    assert program is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "must be at least 1"),
        (["--heads", "0"], "must be at least 1"),
        (["--heads", "4", "--kv_heads", "3"], "--heads 4 must be a multiple of --kv_heads 3"),
        (["--decay", "0.1"], "--decay 0.1 must not be above 0"),
        (["--scores", "cubic"], "--scores"),
        (["--out", "/dev/null/attention"], "--out /dev/null/attention: "),
    ],
)
def test_says_what_is_wrong_with_the_command_line(attention, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        attention.parse(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_it_says_so(attention, monkeypatch, capsys, tmp_path):
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)
    monkeypatch.setattr(attention.jax, "devices", lambda: [cpu])
    assert attention.main(["--out", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == "needs a GPU, and JAX found cpu alone\n"
