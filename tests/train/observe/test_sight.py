"""What is seen of a run: operations and peaks, seconds, trackers, the profiler window."""

import dataclasses
import itertools
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from support.exhaustive import exhaustive

from train.configuration import build_model, load_config
from train.errors import UserError
from train.main import main
from train.observe.flops import PEAK_FLOPS, mixing_flops, peak_flops, training_flops_per_token
from train.observe.meter import COSTS, Meter, Stopwatch
from train.observe.metrics import read_metrics
from train.observe.profiler import ProfilerWindow
from train.observe.trackers import WeightsAndBiases
from twomamba_jax import VARIANTS


def test_mixing_by_hand():
    """Heads of 64 at T = 2048: quadratic 2048 x 128; by the state 4 x 2080 x 64 (squared) or 4 x 64 x 64 (linear)."""
    flops = {
        name: mixing_flops(VARIANTS[name].mixer, 64, 2048) for name in ("softmax", "2mamba-e", "2mamba", "mamba2s")
    }
    assert flops == {"softmax": 262_144, "2mamba-e": 262_144, "2mamba": 262_144, "mamba2s": 16_384}
    assert mixing_flops(VARIANTS["2mamba"].mixer, 64, 8192) == 532_480
    assert mixing_flops(VARIANTS["softmax"].mixer, 64, 8192) == 1_048_576
    narrow = dataclasses.replace(VARIANTS["2mamba"].mixer, qk_dim=32)  # 528 features
    assert [mixing_flops(narrow, 64, length) for length in (1024, 8192)] == [1024 * 96, 4 * 528 * 64]


def test_shared_scores_count_once_for_all_heads():
    """K = 128 that 24 heads of V = 64 share: T (128 / 24 + 64) by the scores, 4 x 128 x 64 by the state."""
    released = VARIANTS["mamba2-released"].mixer
    assert mixing_flops(released, 64, 24, 24) == pytest.approx(24 * (128 / 24 + 64))
    assert mixing_flops(released, 64, 2048, 24) == 4 * 128 * 64


def test_training_is_six_a_parameter_and_three_times_the_mixing():
    config = load_config("configs/2mamba.py")
    model = build_model(config).config
    params = {"embedding": {"embedding": SimpleNamespace(size=10**9)}, "head": SimpleNamespace(size=1000)}
    mixing = config.model.num_layers * config.model.num_heads * 256 * 128
    assert training_flops_per_token(model, params, 256) == 6 * 1000 + 3 * mixing
    tied = dataclasses.replace(model, tie_embeddings=True)
    assert training_flops_per_token(tied, {"embedding": params["embedding"]}, 256) == 6 * 10**9 + 3 * mixing


def test_the_peak_is_of_all_devices_or_unknown():
    h200, other = SimpleNamespace(device_kind="NVIDIA H200"), SimpleNamespace(device_kind="abacus")
    assert peak_flops([h200, h200]) == 2 * PEAK_FLOPS["NVIDIA H200"] == 1.978e15
    assert peak_flops([h200, other]) is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows a second more at each look."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


def test_a_stopwatch_counts_while_it_runs(clock):
    watch = Stopwatch()
    assert watch.lap() == 0
    with watch.running():  # 0 to 1
        pass
    watch.resume()  # 2
    assert watch.lap() == 2  # 1 + (3 - 2); goes on from 4
    assert watch.lap() == 1  # 5 - 4; goes on from 6
    watch.pause()  # 7
    assert watch.lap() == 1


def test_a_meter_divides_by_steps(clock):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5, "peak_bytes_in_use": 7})
    meter = Meter(tokens_per_step=100, flops_per_token=30.0, peak=6000.0, device=device)
    meter.training.resume()  # 0
    for _ in range(2):  # 1 to 2, 3 to 4
        with meter.data.running():
            pass
    assert meter.lap(5) == {  # 5
        "seconds_per_step": 1.0,
        "tokens_per_second": 100.0,
        "seconds_in_data": 0.4,
        "mfu": 0.5,
        "memory_bytes": 5,
        "memory_peak_bytes": 7,
    }
    assert set(COSTS) == set(meter.lap(1))
    silent = Meter(100, 30.0, None, SimpleNamespace(memory_stats=lambda: None))
    silent.training.resume()
    assert silent.lap(1).keys() == {"tokens_per_second", "seconds_per_step", "seconds_in_data", "mfu"}
    assert silent.lap(1)["mfu"] == "unknown"


@exhaustive("what a run and its profiler window write, by parts; workdirs with brackets in test_checkpoint.py")
def test_a_run_with_tensorboard_and_a_profiler_window(tiny, tmp_path):
    workdir = tmp_path / "exp[1]"
    assert main(tiny(workdir, log__tensorboard=True, profile__start=3, profile__steps=2, steps=6)) == 0
    (events,) = (workdir / "tensorboard").iterdir()
    content = events.read_bytes()
    record = read_metrics(workdir / "metrics.jsonl")[-1]
    assert record["mfu"] == "unknown"
    assert [content.count(key) for key in (b"train/loss", b"tokens_per_second", b"eval/loss")] == [3, 3, 2]
    assert b"mfu" not in content
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_a_profiler_window_holds_its_steps(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for start, steps, expected in (
        (2, 2, [1, "start", 2, 3, "stop", 4]),
        (4, 5, [1, 2, 3, "start", 4, "stop"]),
        (None, 1, [1, 2, 3, 4]),
    ):
        calls.clear()
        window = ProfilerWindow(start, steps, tmp_path)
        for step in range(1, 5):
            window.before(step)
            calls.append(step)
        window.close()
        assert calls == expected


class FakeWandb:
    """Notes what the package is asked to do."""

    def __init__(self):
        self.calls = []

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, figures, step):
        self.calls.append((step, figures))

    def finish(self):
        self.calls.append("finish")


def test_weights_and_biases_gets_the_numbers_and_goes_on_with_its_run(monkeypatch, tmp_path):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = load_config("configs/2mamba.py")
    for _ in range(2):
        tracker = WeightsAndBiases(tmp_path, "project", config)
        tracker.write({"step": 4, "train/loss": 2.5, "train/accuracy": None, "mfu": "unknown"})
        tracker.close()
    first, written, end, second, *_ = fake.calls
    assert (written, end) == ((4, {"train/loss": 2.5}), "finish")
    assert first == second
    assert (first["project"], first["resume"], first["dir"]) == ("project", "allow", str(tmp_path))
    assert len(first["id"]) == 16
    assert first["config"]["model"]["d_model"] == 128


def test_weights_and_biases_without_a_login_is_one_line(monkeypatch, tmp_path):
    class Refusing:
        class Error(Exception):
            pass

        @classmethod
        def init(cls, **_):
            raise cls.Error("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", Refusing)
    with pytest.raises(UserError, match=r"does not start \(api_key not configured \(no-tty\)\): `wandb login`, "):
        WeightsAndBiases(tmp_path, "project", load_config("configs/2mamba.py"))


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch, tiny, tmp_path, user_error, key, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = user_error(tiny(tmp_path / "run", **{f"log.{key}": True}))
    assert not (tmp_path / "run").exists()
    assert f"this needs the package '{package}'" in line
    assert "pip install 'twomamba-jax[log]'" in line
