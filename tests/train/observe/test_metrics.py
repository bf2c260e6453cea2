"""metrics.jsonl, the plot of it, and what is shown of it."""

import io
import json

import pytest
from rich.console import Console

from train.errors import UserError
from train.observe.metrics import MetricsWriter, only_finite, read_metrics
from train.observe.plot import main as plot_main
from train.observe.plot import plot_runs, points_of
from train.observe.progress import ProgressDisplay, duration

pytestmark = pytest.mark.quick

RECORD = {
    "step": 10, "train/loss": 2.5, "train/skipped": 0,
    "tokens_per_second": 1234.6, "seconds_per_step": 2.0, "mfu": 0.4123,
}  # fmt: skip
HELD_OUT = {"eval/loss": 2.0, "eval/accuracy": 0.25, "eval/bits_per_byte": 2.885}


def test_each_step_is_there_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    for step in (2, 4, 6, 8):
        writer.write({"step": step, "train/loss": float(step)})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 10, "train/lo')  # a kill in the middle of a write
    writer = MetricsWriter(path, 4)
    writer.write({"step": 6, "train/loss": 0.1})
    assert read_metrics(path)[-1] == {"step": 6, "train/loss": 0.1}  # written before the file is closed
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_floats_come_back_bit_for_bit(tmp_path):
    writer = MetricsWriter(tmp_path / "m", 0)
    writer.write({"step": 1, "x": 1 / 3})
    writer.close()
    assert read_metrics(tmp_path / "m") == [{"step": 1, "x": 1 / 3}]


def test_no_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "none") == []


FOREIGN = [
    b"[1]",
    b"null",
    b'"step"',
    b"12",
    b"",
    b"not JSON",
    b'{"train/loss": 1.0}',
    b'{"step": "1"}',
    b'{"step": 1.5}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 1, "name": "\xff"}',
    b"\0" * 40,
    b"[" * 100_000,
    b'{"step": 9, "tra',
]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: ascii(line[:24]))
def test_a_line_that_is_no_record_is_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 2.0}\n' + line + b'\n{"step": 2, "train/loss": 1.0}\n')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    MetricsWriter(path, 1).close()  # as a run does that is resumed after step 1
    assert path.read_text() == '{"step": 1, "train/loss": 2.0}\n'


def test_metrics_that_cannot_be_read_are_one_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: Is a directory"):
        read_metrics(tmp_path / "metrics.jsonl")
    assert plot_main([str(tmp_path)]) == 2
    assert "error: cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("records", [[], [{"step": 1, "train/loss": 3.0}, {"step": 2, "eval/loss": 2.0}]])
def test_plot_is_a_png(tmp_path, records):
    plot_runs({"title": records}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "text"), [(9.4, "9s"), (130, "2m10s"), (3900, "1h05m"), (0, "0s")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_where_there_is_no_terminal():
    output = io.StringIO()
    with ProgressDisplay(Console(file=output), 0, 20) as display:
        display.advance(5)
        display.report(RECORD | HELD_OUT)
    assert output.getvalue() == (
        "step 10/20  loss 2.5000  1,235 tokens/s  MFU 41.2 %  20s left  "
        "held-out loss 2.0000 nats, 2.8850 bits per byte, accuracy 25.00 %\n"
    )


def test_a_bar_on_a_terminal():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with ProgressDisplay(console, 0, 20) as display:
        display.advance(10)
        display.report(RECORD)
    text = output.getvalue()
    assert "10/20" in text
    assert "loss 2.5000  1,235 tokens/s  MFU 41.2 %  20s left" in text


def test_figures_that_are_not_finite_are_none():
    record = {"step": 1, "a": float("nan"), "b": float("inf"), "c": 2.0, "d": "unknown"}
    assert only_finite(record) == {"step": 1, "a": None, "b": None, "c": 2.0, "d": "unknown"}


def test_a_skipped_step_and_an_unknown_peak_are_said():
    output = io.StringIO()
    with ProgressDisplay(Console(file=output), 0, 20) as display:
        display.report(RECORD | {"train/loss": None, "train/skipped": 3, "mfu": "unknown"} | {"eval/loss": None})
    assert output.getvalue() == (
        "step 10/20  step skipped  3 skipped  1,235 tokens/s  MFU unknown  20s left  held-out loss not finite\n"
    )


def test_the_command_draws_runs_over_each_other(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr("train.observe.plot.plot_runs", lambda runs, path: drawn.update(runs=runs, path=path))
    for name in ("a/run", "b/run"):
        (tmp_path / name).mkdir(parents=True)
        MetricsWriter(tmp_path / name / "metrics.jsonl", 0).close()
    out = str(tmp_path / "x.png")
    assert plot_main([str(tmp_path / "a/run"), "--out", out]) == 2
    assert "a/run has no metrics.jsonl with a record" in capsys.readouterr().err
    assert plot_main([str(tmp_path / "a/run"), "--out", "x.svg"]) == 2
    assert "--out x.svg must end in .png" in capsys.readouterr().err
    for number, name in enumerate(("a/run", "b/run")):
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": number, "train/loss": 1.0}) + "\n")
    assert plot_main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--out", out]) == 0
    assert {name: records[0]["step"] for name, records in drawn["runs"].items()} == {"a/run": 0, "b/run": 1}
    assert str(drawn["path"]) == out


def test_points_leave_out_what_is_not_there():
    records = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": None}, {"step": 3, "eval/loss": 2.0}]
    assert points_of(records, "train/loss") == ([1], [3.0])
    assert points_of(records, "eval/loss") == ([3], [2.0])


def test_points_leave_out_what_cannot_be_drawn():
    values = ["2.0", [1], {}, float("nan"), float("inf"), 10**400, 1e300, 1, 2.5]
    records = [{"step": step, "train/loss": value} for step, value in enumerate(values)]
    assert points_of(records, "train/loss") == ([7, 8], [1, 2.5])


def test_a_name_is_drawn_whatever_it_is(tmp_path):
    names = ("$\\frac$", "_hidden", "\udcff", "[/red]x")
    plot_runs({name: [{"step": 1, "train/loss": 3.0}] for name in names}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
