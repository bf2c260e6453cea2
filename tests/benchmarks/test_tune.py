"""`benchmarks/tune.py` with made-up times: what it chooses, refuses and writes."""

import importlib
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.quadratic import table


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """The script as a module, on "a GPU", with a copy of the table to write."""
    module = importlib.import_module("tune")
    monkeypatch.setattr(module, "unsupported_device", lambda: None)
    monkeypatch.setattr(module, "device_kind", lambda: "a GPU")
    monkeypatch.setattr(module, "TOTAL", 2048)
    monkeypatch.setattr(module.table, "__file__", shutil.copy(table.__file__, tmp_path / "table.py"))
    return module


def test_writes_the_fastest_tiles_that_agree(tune, monkeypatch, tmp_path, capsys):
    def measure(language, score, tiles, inputs):
        wrong = tiles[0]["num_stages"] == 4  # the fastest forward kernel
        times = {kernel: 1 / kind["num_stages"] for kernel, kind in zip(tune.KERNELS, tiles, strict=True)}
        return times, [jnp.full((3,), 2.0 if wrong else 1.0)]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(
        sys, "argv", ["tune.py", "--scores", "squared", "--head_dims", "64", "--tokens", "1024", "2048"]
    )
    tune.main()

    written = runpy.run_path(str(tmp_path / "table.py"))["TABLE"]
    new = {key: written.pop(key) for key in list(written) if key[0] == "a GPU"}
    assert written == table.TABLE
    assert list(new) == [("a GPU", "squared", 64, tokens) for tokens in (1024, 2048)]
    for forward, queries, keys in new.values():
        assert (forward["num_stages"], queries["num_stages"], keys["num_stages"]) == (3, 4, 4)
    assert "REFUSED: differs from the first" in capsys.readouterr().out


def test_prints_entries_of_the_triton_table(tune, monkeypatch, capsys):
    """Tiles that the GPU refuses are left out; of several lengths the longest is timed."""

    def measure(language, score, tiles, inputs):
        assert inputs[0].shape[1] == 2048
        if tiles[0]["own"] == 128:
            raise jax.errors.JaxRuntimeError("Shared memory requested exceeds device resources")
        return {kernel: tiles[0]["num_stages"] - i * tiles[0]["streamed"] for i, kernel in enumerate(tune.KERNELS)}, [
            jnp.ones((3,))
        ]

    def candidates(score, head_dim):
        return tune.triton_candidates(head_dim)

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "triton_language", lambda: tune.Language(None, None, candidates, None))
    monkeypatch.setattr(tune.triton, "unsupported_device", lambda: None)
    monkeypatch.setattr(tune.triton, "capability", lambda: 89)
    options = ["--implementation", "triton", "--scores", "exp", "--head_dims", "64", "--tokens", "2048", "1024"]
    monkeypatch.setattr(sys, "argv", ["tune.py", *options])
    tune.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum("REFUSED: Shared memory requested exceeds device resources" in line for line in lines) == 3
    assert lines[-3:] == [
        "('forward', 86, 'exp', 64): {'own': 64, 'streamed': 32, 'warps': 4, 'num_stages': 2},",
        "('queries', 86, 'exp', 64): {'own': 64, 'streamed': 64, 'warps': 4, 'num_stages': 3},",
        "('keys', 86, 'exp', 64): {'own': 64, 'streamed': 64, 'warps': 4, 'num_stages': 3},",
    ]


def test_without_a_gpu_it_says_so(tune, monkeypatch):
    monkeypatch.setattr(tune, "unsupported_device", lambda: "it needs a GPU")
    monkeypatch.setattr(sys, "argv", ["tune.py"])
    with pytest.raises(SystemExit, match="nothing to tune here: it needs a GPU"):
        tune.main()
