"""`benchmarks/train_step.py` with a tiny nano model for two steps: what it trains, reports and survives."""

import dataclasses
import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # no other way to the primitive
from support.exhaustive import exhaustive

from train.errors import UserError

ROOT = Path(__file__).parents[2]
MODEL = {"d_model": 16, "num_layers": 1, "head_dim": 8, "mlp_dim": 32}


@pytest.fixture(scope="module")
def script():
    """The script as a module, beside those that it imports."""
    return importlib.import_module("train_step")


class InThisProcess:
    """A row's program without a process."""

    def __init__(self, script, row, task):
        self.rows = script.step_row.train(row, task)
        next(self.rows)

    def ask(self):
        pass

    def answer(self):
        return json.loads(json.dumps(dataclasses.asdict(next(self.rows))))

    def close(self):
        self.rows.close()


@pytest.fixture
def in_this_process(script, monkeypatch):
    monkeypatch.setattr(script, "program_of", lambda row, task: InThisProcess(script, row, task))


def train(script, row, options):
    """The row after its last turn."""
    task = script.task_of(options)
    return list(itertools.islice(script.step_row.train(row, task), 2 + len(task.turns)))[-1]


def config_of(script, row, options):
    return script.step_row.config_of(row, script.task_of(options))


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
    config = config_of(script, xla, options)
    assert (config.variant, config.steps, config.batch_size, config.length) == ("softmax", 2, 2, 32)
    assert (config.execution.implementation, config.execution.form) == ("xla", None)
    assert config.model.d_model == 16
    config = config_of(script, kernels, options)
    assert (config.execution.implementation, config.execution.form) == ("mosaic_gpu", None)
    *_, perturbed = script.rows_of(script.parse([*arguments, "--variants", "softmax", "--perturbations", "1e-6"]))
    assert (perturbed.implementation, perturbed.perturbation) == ("xla", 1e-6)


def test_cudnn_stands_in_for_softmax(script, arguments):
    """In rows of that variant only, which then differ by the documents that it does not keep apart."""
    chosen = ["--variants", "2mamba", "softmax", "--implementations", "xla", "cudnn"]
    options = script.parse([*chosen, *arguments, "execution.remat=none"])
    *_, row = rows = script.rows_of(options)
    pairs = [("2mamba", "xla"), ("softmax", "xla"), ("softmax", "cudnn")]
    assert [(row.variant, row.implementation) for row in rows] == pairs
    assert config_of(script, row, options).execution.implementation is None

    assert script.cudnn_softmax.dear(fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper)


@exhaustive("test_cudnn_stands_in_for_softmax, for its rows; no run without a GPU has cuDNN")
def test_a_row_of_cudnn_trains(script, arguments, monkeypatch):
    chosen = ["--variants", "softmax", "--implementations", "xla", "cudnn"]
    options = script.parse([*chosen, *arguments, "execution.remat=none"])
    softmax, row = script.rows_of(options)
    calls, by_jax = [], jax.nn.dot_product_attention

    def attention(*arrays, implementation, **how):
        calls.append((implementation, how["is_causal"]))
        return by_jax(*arrays, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    trained = train(script, row, options)
    assert set(calls) == {("cudnn", True)}
    assert trained.losses == pytest.approx([math.log(512)] * 2, abs=0.3)
    assert trained.losses == pytest.approx(train(script, softmax, options).losses, rel=0.01)
    assert "without a decay" in train(script, dataclasses.replace(row, variant="2mamba"), options).note


def test_recomputes_where_asked_and_where_the_configuration_does(script, arguments):
    def remat(*more):
        options = script.parse([*arguments, "--remat", *more])
        return [config_of(script, row, options).execution.remat for row in script.rows_of(options)[:2]]

    assert remat() == ["full", "full"]  # as nano's own
    assert remat("--override", "execution.remat=none") == ["none", "none"]
    small = ["--config", f"{ROOT / 'configs/2mamba.py'}:small"]
    assert remat("xla", *small) == ["full", "dots"]


@pytest.mark.usefixtures("in_this_process")
def test_prints_a_table_and_writes_the_losses(script, arguments, capsys):
    """A run that cannot be made has its reason in the table, and the exit status is 1."""
    chosen = ["--variants", "linear", "3mamba", "--implementations", "xla", "--perturbations", "1e-3"]
    assert script.main([*arguments, *chosen, "--parts", "2"]) == 1

    report = json.loads(Path(script.parse(arguments).out.as_posix() + ".json").read_text())
    assert report["command"].startswith("python benchmarks/train_step.py --config ")
    assert report["versions"].keys() >= {"jax", "jaxlib"}
    row, failed, perturbed, _ = report["rows"]
    assert 1e-7 < perturbed["largest_loss_difference"] < 0.1
    assert (row["variant"], row["implementation"], row["batch"], row["length"]) == ("linear", "xla", 2, 32)
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
    assert parts[:2] == ["| part | linear, xla | linear, xla (1 + 0.001) |", "|---|---:|---:|"]
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
    assert cells[:5] == ["| linear", "xla", "full", "2", "32"]
    assert cells[5:7] == [f"{loss:.4f}" for loss in row["losses"]]
    assert failed["note"] in lines[-3]
    assert len({line.count(" | ") for line in (lines[-6], *lines[-4:])}) == 1


def row_of(script, implementation, losses, tokens_per_second, variant="2mamba", **more):
    """Of 2 x 32 tokens."""
    times = (2 * 32 / tokens_per_second * 1e3,)
    more = {"flops_per_token": 1e6, "compile_seconds": 3.0, "device": "NVIDIA H200"} | more
    return script.Row(variant, implementation, 2, 32, losses=losses, milliseconds_by_turn=times, **more)


def test_compares_with_xla_and_with_the_better_peer(script):
    rows = [
        row_of(script, "mosaic_gpu", (3.0, 2.5), 300.0),
        row_of(script, "xla", (3.0, 2.75), 100.0),
        script.Row("softmax", "xla", 2, 32),
        row_of(script, "torch", (9.0, 8.0), 200.0, "transformer", setting="default"),
        row_of(script, "torch", (9.0, 8.0), 250.0, "transformer", setting="max-autotune-no-cudagraphs"),
    ]
    kernels, _, untrained, _, peer = records = script.records_of(rows)
    assert kernels["speed_over_xla"] == pytest.approx(3)
    assert kernels["largest_loss_difference"] == 0.25
    assert kernels["speed_over_torch"] == pytest.approx(1.2)
    assert kernels["tflops"] == pytest.approx(300e6 / 1e12)
    assert kernels["mfu"] == pytest.approx(300e6 / 989e12)
    assert (peer["speed_over_torch"], "speed_over_xla" in peer) == (1, False)
    assert "speed_over_xla" not in untrained
    untrained["note"] = "why"
    header, _, *lines = script.table(records, 2).splitlines()
    assert "| over PyTorch | TFLOP/s | MFU |" in header
    assert {line.count(" | ") for line in lines} == {header.count(" | ")}
    cells = lines[-1].split(" | ")
    assert cells[:7] == ["| transformer", "torch, max-autotune-no-cudagraphs", "", "2", "32", "", ""]


def test_turns_and_settings_are_rows(script, arguments):
    """Every run with every setting; what is the compiler's does not go into the configuration, nor does the code."""
    settings = [
        "--setting",
        "loop",
        "execution.scan_layers=True",
        "--setting",
        "no graphs",
        "xla_some_flag=",
        "xla_n=0",
    ]
    settings += ["--setting", "before", "code=/else", "loss_chunk_size=64"]
    chosen = ["--variants", "2mamba", "softmax", "--implementations", "xla", "--steps", "8", "--turns", "3"]
    options = script.parse([*arguments, *chosen, *settings])
    task = script.task_of(options)
    assert task.turns == (3, 3, 2)
    rows = script.rows_of(options)
    assert [(row.variant, row.setting) for row in rows] == list(
        itertools.product(("2mamba", "softmax"), ("loop", "no graphs", "before"))
    )
    loop, no_graphs, before = rows[:3]
    assert script.step_row.config_of(loop, task).execution.scan_layers is True
    assert script.step_row.compiler_options(loop) is None
    assert script.step_row.compiler_options(no_graphs) == {"xla_some_flag": "", "xla_n": 0}
    assert script.step_row.config_of(no_graphs, task).execution.scan_layers is None
    assert (before.code, script.step_row.config_of(before, task).loss_chunk_size) == ("/else", 64)
    assert script.step_row.config_of(before, task).steps == 8


@exhaustive("test_turns_and_settings_are_rows, and test_prints_a_table_and_writes_the_losses")
@pytest.mark.usefixtures("in_this_process")
def test_runs_take_turns(script, arguments, capsys):
    chosen = ["--variants", "softmax", "--implementations", "xla", "--steps", "3", "--turns", "3"]
    settings = ["--setting", "a", "loss_chunk_size=64", "--setting", "b", "loss_chunk_size=64"]  # one program
    assert script.main([*arguments, *chosen, *settings]) == 0
    told = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["softmax xla a 2 x 32", "softmax xla b 2 x 32"] * 4
    report = json.loads(Path(script.parse(arguments).out.as_posix() + ".json").read_text())
    for row in report["rows"]:
        assert len(row["losses"]) == len(row["milliseconds_by_turn"]) == 3
        assert row["milliseconds"] == sorted(row["milliseconds_by_turn"])[1]
        assert row["compile_seconds"] > 0


def test_a_program_answers_turn_by_turn(script, monkeypatch):
    """What it prints besides goes to standard error."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    code = "import turns; turns.serve(print('-') or {'turn': n} for n in range(3))"
    program = script.Program([sys.executable, "-c", code], {})
    program.ask()
    assert program.answer() == {"turn": 1}
    program.ask()
    assert program.answer() == {"turn": 2}
    program.close()


@exhaustive("test_a_program_answers_turn_by_turn, and rows in this process above")
def test_a_row_has_a_process_of_its_own(script, arguments, compilation_cache, monkeypatch, capsys):
    """Its first step is that of this process, and what it prints besides goes to standard error."""
    for key, value in compilation_cache.items():
        monkeypatch.setenv(key.upper(), str(value))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    chosen = ["--variants", "softmax", "--implementations", "xla"]
    assert script.main([*arguments, *chosen]) == 0
    report = json.loads(Path(script.parse(arguments).out.as_posix() + ".json").read_text())
    options = script.parse([*arguments, *chosen])
    expected = train(script, script.rows_of(options)[0], options)
    assert report["rows"][0]["losses"] == pytest.approx(list(expected.losses), rel=1e-6)
    assert "| softmax | xla | full | 2 | 32 |" in capsys.readouterr().out


def test_reports_a_process_that_died(script, arguments, monkeypatch, capsys):
    command = [sys.executable, "-c", "import os; os._exit(3)"]
    monkeypatch.setattr(script, "program_of", lambda row, task: script.Program(command, {}))
    assert script.main([*arguments, "--variants", "2mamba", "--implementations", "xla"]) == 1
    assert "| its process died |" in capsys.readouterr().out.splitlines()[-1]


def test_a_peer_needs_pytorch(script, arguments, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(SystemExit) as exit_:
        script.parse([*arguments, "--peers", "torch"])
    assert exit_.value.code == 2
    assert "--peers torch: PyTorch is not installed here" in capsys.readouterr().err.splitlines()[-1]


def test_a_peer_is_told_the_sizes(script, arguments, monkeypatch):
    """A row for each mode, whose process gets the sizes of the configuration and none of ours."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: script if name == "torch" else find_spec(name))
    commands = []
    monkeypatch.setattr(script, "Program", lambda command, environment: commands.append((command, environment)))
    peers = ["--peers", "torch", "--torch-modes", *script.TORCH_MODES, "--turns", "2", "--variants", "2mamba"]
    options = script.parse([*arguments, *peers])
    *_, first, second = script.rows_of(options)
    assert [(row.variant, row.implementation) for row in (first, second)] == [("transformer", "torch")] * 2
    script.program_of(second, script.task_of(options))
    ((command, environment),) = commands
    assert command[1].endswith("benchmarks/torch_peer.py")
    assert environment == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    row, model, optimizer, turns = json.loads(command[2])
    assert (row["setting"], row["batch"], row["length"]) == ("max-autotune-no-cudagraphs", 2, 32)
    assert (model["d_model"], model["num_heads"], model["vocab_size"]) == (16, 2, 512)
    assert optimizer["learning_rate"] == 3e-3
    assert turns == [1, 1]


def test_a_peer_trains(script, arguments):
    """Where PyTorch is installed: a table with its row, whose operations are ours of a softmax model."""
    pytest.importorskip("torch", reason="PyTorch is no dependency")
    chosen = ["--variants", "softmax", "--implementations", "xla", "--peers", "torch"]
    assert script.main([*arguments, *chosen]) == 0
    report = json.loads(Path(script.parse(arguments).out.as_posix() + ".json").read_text())
    ours, peer = report["rows"]
    assert peer["losses"][-1] < peer["losses"][0]
    assert peer["flops_per_token"] == pytest.approx(ours["flops_per_token"], rel=0.01)


def test_says_what_is_wrong(script, arguments, capsys):
    for wrong, message in (
        (["--override", "steps"], "--override steps: expected KEY=VALUE"),
        (["--implementations", "cuda"], "--implementations"),
        (["--out", "/dev/null/steps"], "--out /dev/null/steps: "),
        (["--setting", "a", "steps"], "--setting steps: expected KEY=VALUE"),
        (["--turns", "3"], "--turns 3: expected from 1 to --steps 2"),
        (["--torch-modes", "fast"], "--torch-modes"),
    ):
        with pytest.raises(SystemExit) as exit_:
            script.parse([*arguments, *wrong])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    options = script.parse([*arguments, "--steps", "0"])
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        config_of(script, script.rows_of(options)[0], options)
