"""Importing the library costs little and brings none of what only training needs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import twomamba_jax
from twomamba_jax import generation

MEASURE = """
import json, sys, time
import jax, flax
start = time.perf_counter()
before = set(sys.modules)
import twomamba_jax
print(json.dumps({"seconds": time.perf_counter() - start, "modules": sorted(set(sys.modules) - before)}))
"""


def test_import_is_quick_and_alone():
    root = Path(twomamba_jax.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, text=True, capture_output=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["seconds"] < 2
    assert "twomamba_jax.ops.decay_attention" in measured["modules"]
    packages = {name.partition(".")[0] for name in measured["modules"]}
    training = {"optax", "orbax", "grain", "ml_collections", "rich", "matplotlib", "train", "configs"}
    assert not packages & training


def test_public_names_exist():
    names = twomamba_jax.__all__
    assert [name for name in names if not hasattr(twomamba_jax, name)] == []
    assert len(set(names)) == len(names)


def test_the_command_and_the_function_share_a_name():
    """Importing what `python -m` runs leaves the function where it is."""
    assert importlib.import_module("twomamba_jax.generate") is generation.generate
    assert twomamba_jax.generate is generation.generate
