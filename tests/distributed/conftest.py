"""Programs for more devices than this machine has: JAX simulates them, but only where told so before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train

# The directory that holds the package under test.
ROOT = Path(train.__file__).parents[1]


@pytest.fixture(scope="session")
def simulate():
    """A function that runs a program of this directory on simulated devices and returns what it prints, JSON."""

    def run(program: str, *arguments: object, devices: int = 8) -> Any:
        path = Path(__file__).parent / program
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compilation is nearly all that these cost
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        command = [sys.executable, str(path), *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        # XLA's words for an array that it puts whole on every device, since it cannot get from one cut to another.
        assert "Involuntary full rematerialization" not in done.stderr, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
