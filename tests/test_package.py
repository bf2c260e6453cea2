"""The wheel: the library and its kernels alone, in a place where there is no clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.exhaustive import exhaustive

import twomamba_jax

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: setuptools leaves its traces beside what it builds."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("twomamba_jax", "pallas_kernels", "train", "configs"):
        shutil.copytree(ROOT / name, copy / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (path,) = copy.glob("*.whl")
    return zipfile.ZipFile(path)


def run_with(wheel: zipfile.ZipFile, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    wheel.extractall(directory)
    environment = os.environ | {"PYTHONPATH": str(directory), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)


def test_it_holds_the_library_and_the_kernels(wheel):
    names = wheel.namelist()
    metadata = f"twomamba_jax-{twomamba_jax.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"twomamba_jax", "pallas_kernels", metadata}
    assert {"twomamba_jax/py.typed", "pallas_kernels/py.typed"} < set(names)


def test_readme_composes_with_it(wheel, tmp_path):
    """In shapes, for which nothing is compiled; test_readme.py has the values."""
    code, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    traced = f"import jax\nnames = {{}}\njax.eval_shape(lambda: exec({code!r}, names))\n"
    found = "import twomamba_jax\nprint(twomamba_jax.__file__, names['y'].shape)"
    done = run_with(wheel, tmp_path, "-c", traced + found)
    assert done.stdout == f"{tmp_path}/twomamba_jax/__init__.py (2, 100, 4, 32)\n", done.stderr


def test_generating_from_a_run_says_that_it_needs_a_clone(wheel, tmp_path):
    done = run_with(wheel, tmp_path, "-m", "twomamba_jax.generate", "--workdir", "run", "--prompt", "a")
    assert done.returncode == 2
    assert done.stderr == (
        "error: No module named 'train': run this in a clone of the repository, after pip install -e \".[train]\"\n"
    )


def test_benchmarks_find_the_training_program(tmp_path):
    """Also where it is not installed, and the directory is another."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-c", "import clone, train.errors"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (ROOT / "benchmarks" / "ladder.py").read_text()
    assert script.index("\nimport clone ") < script.index("\nfrom train.")


@exhaustive("the test above, for what it imports first")
def test_a_benchmark_starts_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "ladder.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
