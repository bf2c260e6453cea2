"""The Triton kernels compile for every architecture, without a GPU, and no register is touched too early."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def compiled(tmp_path, *options):
    out = tmp_path / "reports.json"
    command = [sys.executable, "benchmarks/compile_triton.py", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, json.loads(out.read_text())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install 'triton>=3.7,<3.8'")
def test_one_tile_of_each_kernel_compiles_for_each_architecture(tmp_path):
    done, reports = compiled(tmp_path, "--one_of_each")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {report["architecture"]: 0 for report in reports}
    for report in reports:
        kernels[report["architecture"]] += 1
        assert not report["problems"]
        assert report["registers"]
        assert report["resident_warps"]
    assert kernels == dict.fromkeys((80, 86, 89, 90, 100, 120), 13)
