"""`benchmarks/scaling.py`: what it trains on which GPUs, what it divides by, and that one process ends the wait."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
from support.exhaustive import exhaustive

ROOT = Path(__file__).parents[2]
TINY = ["model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.head_dim=8", "model.mlp_dim=32"]


@pytest.fixture(scope="module")
def script():
    """The script as a module, beside those that it imports."""
    return importlib.import_module("scaling")


@pytest.fixture
def arguments(tmp_path):
    """Of four steps of a tiny model on a corpus of a few lines."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"file{number:02d}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    data = [f"data.root={tmp_path / 'corpus'}", "data.held_out_percent=10"]
    sizes = ["--config", str(ROOT / "configs/2mamba.py"), "--batch", "2", "--length", "32", "--steps", "4"]
    options = ["--implementation", "xla", "--turns", "2", "--out", str(tmp_path / "new" / "scaling")]
    return [*sizes, *options, "--override", *TINY, *data]


def test_a_mesh_has_the_rows_of_its_gpus(script, arguments):
    """But for the axis `sequence`, whose GPUs share them."""
    chosen = ["--meshes", "data=4", "fsdp=2,tensor=2", "sequence=4", "--processes", "data=2"]
    points = script.points_of(script.parse([*arguments, *chosen]))
    found = [(p.row.setting, p.devices, p.processes, p.row.batch, p.row.length) for p in points]
    assert found == [
        ("1", 1, 1, 2, 32),
        ("data=4", 4, 1, 8, 32),
        ("fsdp=2,tensor=2", 4, 1, 8, 32),
        ("sequence=4", 4, 1, 2, 32),
        ("data=2, 2 processes", 2, 2, 4, 32),
    ]
    assert points[2].row.set == ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.sequence=1")


def test_settings_are_of_meshes_alone(script, arguments):
    chosen = ["--meshes", "data=2", "--setting", "plain", "--setting", "full", "execution.remat=full", "xla_a=1"]
    alone, plain, full = script.points_of(script.parse([*arguments, *chosen]))
    assert [point.row.setting for point in (alone, plain, full)] == ["1", "data=2, plain", "data=2, full"]
    assert full.row.set == (*plain.row.set, "execution.remat=full", "xla_a=1")


def test_a_mesh_is_no_override(script, arguments, capsys):
    with pytest.raises(SystemExit):
        script.parse([*arguments, "mesh.data=2"])
    assert "meshes are given by --meshes" in capsys.readouterr().err


@pytest.mark.parametrize("mesh", ["data", "data=0", "data=x", "model=2", "2"])
def test_another_mesh_is_refused(script, arguments, mesh, capsys):
    with pytest.raises(SystemExit):
        script.parse([*arguments, "--meshes", mesh])
    assert f"{mesh!r}: expected AXIS=SIZE" in capsys.readouterr().err


def test_a_run_sees_its_gpus(script, arguments, monkeypatch):
    """The first of those that there are; where there are several processes, each its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,")
    started = []
    monkeypatch.setattr(script, "program_of", lambda row, task, environment: started.append((row, environment)))
    options = script.parse([*arguments, "--meshes", "data=2", "--processes", "data=2"])
    for point in script.points_of(options):
        script.programs_of(point, script.task_of(options))
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in started] == ["3", "3,5", "3", "5"]
    assert [environment["JAX_NUM_CPU_DEVICES"] for _, environment in started] == ["1", "2", "1", "1"]
    first, second = ([s for s in row.set if s.startswith("distributed.")] for row, _ in started[2:])
    assert first[:2] == second[:2]
    assert [first[0].rpartition(":")[0], *first[1:], second[2]] == [
        "distributed.coordinator_address=localhost",
        "distributed.num_processes=2",
        "distributed.process_id=0",
        "distributed.process_id=1",
    ]


@pytest.mark.parametrize("named", ["3", ""])
def test_gpus_that_are_not_there(script, arguments, monkeypatch, named):
    """Too few are an error before anything starts; that there are none is the user's to say."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    started = []
    monkeypatch.setattr(script, "program_of", lambda row, task, environment: started.append(environment))
    options = script.parse([*arguments, "--meshes", "data=2"])
    _, point = script.points_of(options)
    if named:
        with pytest.raises(script.UserError, match="data=2 needs 2 GPUs, and CUDA_VISIBLE_DEVICES=3 names 1"):
            script.programs_of(point, script.task_of(options))
        assert not started
    else:
        script.programs_of(point, script.task_of(options))
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in started] == [""]


class Answers:
    """A row's program without a process, which steps in so many milliseconds."""

    def __init__(self, row, milliseconds):
        self.row, self.milliseconds, self.turns = row, milliseconds, 0

    def ask(self):
        self.turns += 1

    def answer(self):
        times = (self.milliseconds,) * (self.turns - 1)
        row = dataclasses.replace(self.row, compile_seconds=1.0, milliseconds_by_turn=times, losses=(6.0,) * len(times))
        return json.loads(json.dumps(dataclasses.asdict(row)))

    def close(self):
        pass


def test_divides_by_as_many_gpus_alone(script, arguments, monkeypatch, capsys):
    milliseconds = {"1": 10.0, "data=2": 12.5, "sequence=2": 6.25}
    monkeypatch.setattr(script, "programs_of", lambda point, task: Answers(point.row, milliseconds[point.row.setting]))
    chosen = ["--variants", "softmax", "--meshes", "data=2", "sequence=2"]
    assert script.main([*arguments, *chosen]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:9] for line in lines[-3:]] == [
        ["1", "1", "2", "32", "6.0000", "10.0", "6,400", "1.000"],
        ["data=2", "2", "4", "32", "6.0000", "12.5", "10,240", "0.800"],
        ["sequence=2", "2", "2", "32", "6.0000", "6.2", "10,240", "0.800"],
    ]
    report = json.loads(Path(f"{script.parse(arguments).out}.json").read_text())
    assert [row["of_alone"] for row in report["rows"]] == [1, 0.8, 0.8]


def test_a_process_that_cannot_go_on_ends_the_wait(script, monkeypatch):
    """The others may wait for it in a collective."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    waits = "import time, turns; turns.serve(time.sleep(turn and 60) or {'note': ''} for turn in range(2))"
    fails = "import turns; turns.serve({'note': 'out of memory'} for _ in range(2))"
    together = script.Together([script.Program([sys.executable, "-c", code], {}) for code in (waits, fails)])
    together.ask()
    assert together.answer() == {"note": "out of memory"}
    together._programs[0]._process.kill()
    together.close()


@exhaustive("the other tests here, and test_train_step.py for a row")
@pytest.mark.parametrize("chosen", [["--meshes", "data=2"], ["--meshes", "--processes", "data=2"]])
def test_several_devices_make_the_steps_of_one(script, arguments, monkeypatch, chosen):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    assert script.main([*arguments, *chosen, "--parts", "1"]) == 0
    report = json.loads(Path(f"{script.parse(arguments).out}.json").read_text())
    alone, several = report["rows"]
    assert len(alone["losses"]) == len(several["losses"]) == 4
    assert several["losses"] == pytest.approx(alone["losses"], rel=0.02)  # of other batches of the same text
    assert several["parts"]["collectives"] > 0
    assert "collectives" not in alone["parts"]
