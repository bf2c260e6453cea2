"""The Triton kernels compile for every architecture, without a GPU, and touch no register of a product in flight."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = 13


@pytest.mark.parametrize("architectures", [(100, 120), (80, 86, 89), (90,)], ids=str)  # half a minute each
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install 'triton>=3.7,<3.8'")
def test_one_tile_of_each_kernel_compiles(tmp_path, architectures):
    out = tmp_path / "reports.json"
    options = "--one_of_each", "--out", str(out), "--architectures", *map(str, architectures)
    command = [sys.executable, "benchmarks/compile_triton.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(out.read_text())
    assert len(reports) == KERNELS * len(architectures)
    for report in reports:
        assert report["registers"]
        assert report["resident_warps"]
