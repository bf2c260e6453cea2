"""metrics.jsonl, the plot of it, and what is shown of it."""

import io
import json

import pytest
from rich.console import Console

from train.metrics import MetricsWriter, read_metrics
from train.plot import plot_runs
from train.progress import ProgressDisplay, duration

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
