"""`benchmarks/mesh_memory.py` on the configuration of a billion parameters."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.exhaustive import EXHAUSTIVE

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not EXHAUSTIVE, reason="ten seconds of one compilation: see exhaustive.py")
def test_a_billion_parameters_compile_for_eight_devices_and_their_state_is_cut_in_eight():
    command = [sys.executable, "benchmarks/mesh_memory.py", "--config", "configs/2mamba.py:large"]
    command += ["--override", "mesh.data=1", "mesh.fsdp=8", "batch_size=8", "execution.remat=full"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    count = int(re.search(r"([\d,]+) parameters, 8 devices", first)[1].replace(",", ""))
    assert 1e9 < count < 1.5e9
    arguments, outputs, in_place, _ = (float(row.split()[-1]) for row in rows)
    # Parameters and two moments in float32. Not cut is what has no `embed` axis: the convolutions, 0.3 % more.
    assert abs(arguments / (3 * 4 * count / 8 / 2**30) - 1) < 5e-3
    assert in_place == outputs  # the state is donated
