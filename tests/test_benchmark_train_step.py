"""`benchmarks/train_step.py` with a tiny nano model for two steps: what it trains, reports and survives."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # no other way to the primitive

from train.errors import UserError

ROOT = Path(__file__).parents[1]
MODEL = {"d_model": 16, "num_layers": 1, "head_dim": 8, "mlp_dim": 32}


@pytest.fixture(scope="module")
def script():
    """The script as a module, beside those that it imports."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_train_step", ROOT / "benchmarks" / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    del sys.modules[spec.name]


@pytest.fixture
def arguments(tmp_path):
    """Of two steps of a tiny model on a corpus of a few lines."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"file{number:02d}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    overrides = [f"model.{key}={value}" for key, value in MODEL.items()]
    overrides += [f"data.root={tmp_path / 'corpus'}", "data.held_out_percent=10"]
    sizes = ["--config", str(ROOT / "configs/2mamba.py"), "--batch", "2", "--length", "32", "--steps", "2"]
    return [*sizes, "--out", str(tmp_path / "new" / "steps"), "--override", *overrides]


def test_trains_as_configured(script, arguments):
    options = script.parse([*arguments, "--variants", "softmax"])
    xla, kernels = script.rows_of(options)
    assert (xla.variant, xla.implementation, kernels.implementation) == ("softmax", "xla", "mosaic_gpu")
    config = script.config_of(xla, options)
    assert (config.variant, config.steps, config.batch_size, config.length) == ("softmax", 2, 2, 32)
    assert (config.execution.implementation, config.execution.form) == ("xla", None)
    assert config.model.d_model == 16
    config = script.config_of(kernels, options)
    assert (config.execution.implementation, config.execution.form) == ("mosaic_gpu", None)
    *_, perturbed = script.rows_of(script.parse([*arguments, "--variants", "softmax", "--perturbations", "1e-6"]))
    assert (perturbed.implementation, perturbed.perturbation) == ("xla", 1e-6)


def test_cudnn_stands_in_for_softmax(script, arguments, monkeypatch):
    """In rows of that variant only, which then differ by the documents that it does not keep apart."""
    chosen = ["--variants", "2mamba", "softmax", "--implementations", "xla", "cudnn"]
    options = script.parse([*chosen, *arguments, "execution.remat=dots"])
    _, softmax, row = rows = script.rows_of(options)
    pairs = [("2mamba", "xla"), ("softmax", "xla"), ("softmax", "cudnn")]
    assert [(row.variant, row.implementation) for row in rows] == pairs
    assert script.config_of(row, options).execution.implementation is None

    calls, by_jax = [], jax.nn.dot_product_attention

    def attention(*arrays, implementation, **how):
        calls.append((implementation, how["is_causal"]))
        return by_jax(*arrays, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    trained, peer = script.train(row, options), script.train(softmax, options)
    assert set(calls) == {("cudnn", True)}
    assert trained.losses == pytest.approx(peer.losses, rel=0.01)
    assert "without a decay" in script.train(dataclasses.replace(row, variant="2mamba"), options).note
    assert script.cudnn_softmax.dear(fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper)


def test_recomputes_where_asked_and_where_the_configuration_does(script, arguments):
    def remat(*more):
        options = script.parse([*arguments, "--remat", *more])
        return [script.config_of(row, options).execution.remat for row in script.rows_of(options)[:2]]

    assert remat() == ["full", "full"]  # as nano's own
    assert remat("--override", "execution.remat=none") == ["none", "none"]
    small = ["--config", f"{ROOT / 'configs/2mamba.py'}:small"]
    assert remat("xla", *small) == ["full", "dots"]


def test_prints_a_table_and_writes_the_losses(script, arguments, monkeypatch, capsys):
    """A run that cannot be made has its reason in the table, and the exit status is 1."""
    monkeypatch.setattr(script, "in_own_process", lambda function, *given: function(*given))
    chosen = ["--variants", "2mamba", "3mamba", "--implementations", "xla", "--perturbations", "1e-3"]
    assert script.main([*arguments, *chosen, "--parts", "2"]) == 1

    report = json.loads(Path(script.parse(arguments).out.as_posix() + ".json").read_text())
    assert report["command"].startswith("python benchmarks/train_step.py --config ")
    assert report["versions"].keys() >= {"jax", "jaxlib"}
    row, failed, perturbed, _ = report["rows"]
    assert 1e-7 < perturbed["largest_loss_difference"] < 0.1
    assert (row["variant"], row["implementation"], row["batch"], row["length"]) == ("2mamba", "xla", 2, 32)
    assert row["device"] == jax.devices()[0].device_kind
    # The untrained model knows nothing of its 512 tokens.
    assert row["losses"] == pytest.approx([math.log(512)] * 2, abs=0.3)
    assert row["losses"][0] != row["losses"][1]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["milliseconds"] * 1e3)
    assert row["parameters"] > 512 * 16
    assert row["temporary_bytes"] > 0
    assert (row["speed_over_xla"], row["largest_loss_difference"], row["note"]) == (1, 0, "")
    assert "3mamba" in failed["note"]

    lines, parts = (text.splitlines() for text in capsys.readouterr().out.rsplit("\n\n", 1))
    assert parts[:2] == ["| part | 2mamba, xla | 2mamba, xla (1 + 0.001) |", "|---|---:|---:|"]
    names = {line.split(" | ")[0] for line in parts[2:]}
    assert names == {f"| {name}" for name in (*row["parts"], *perturbed["parts"])}
    assert names >= {
        "| head and loss",
        "| rest of the mixers, forward",
        "| rest of the mixers, backward",
        "| optimiser",
    }
    assert sum(row["parts"].values()) > 0
    assert lines[-6].startswith("| variant | implementation | remat | B | T | loss at 1 | loss at 2 | off XLA's |")
    cells = lines[-4].split(" | ")
    assert cells[:5] == ["| 2mamba", "xla", "full", "2", "32"]
    assert cells[5:7] == [f"{loss:.4f}" for loss in row["losses"]]
    assert failed["note"] in lines[-3]
    assert len({line.count(" | ") for line in (lines[-6], *lines[-4:])}) == 1


def test_compares_with_xla(script):
    def row(implementation, losses, tokens_per_second):
        return script.Row("2mamba", implementation, 2, 32, losses=losses, tokens_per_second=tokens_per_second)

    rows = [row("mosaic_gpu", (3.0, 2.5), 300.0), row("xla", (3.0, 2.75), 100.0), script.Row("softmax", "xla", 2, 32)]
    kernels, _, untrained = script.records_of(rows)
    assert (kernels["speed_over_xla"], kernels["largest_loss_difference"]) == (3, 0.25)
    assert "speed_over_xla" not in untrained


def test_a_process_of_its_own(script):
    assert script.in_own_process(os.getpid) != os.getpid()
    with pytest.raises(BrokenProcessPool):
        script.in_own_process(os._exit, 3)


def test_reports_a_process_that_died(script, arguments, monkeypatch, capsys):
    def die(function, *given):
        raise BrokenProcessPool

    monkeypatch.setattr(script, "in_own_process", die)
    assert script.main([*arguments, "--variants", "2mamba", "--implementations", "xla"]) == 1
    assert "| its process died |" in capsys.readouterr().out.splitlines()[-1]


def test_says_what_is_wrong(script, arguments, capsys):
    for wrong, message in (
        (["--override", "steps"], "--override steps: expected KEY=VALUE"),
        (["--implementations", "cuda"], "--implementations"),
        (["--out", "/dev/null/steps"], "--out /dev/null/steps: "),
    ):
        with pytest.raises(SystemExit) as exit_:
            script.parse([*arguments, *wrong])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    options = script.parse([*arguments, "--steps", "0"])
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        script.config_of(script.rows_of(options)[0], options)
