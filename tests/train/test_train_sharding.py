"""The mesh, and the shardings that come out of the step on several devices."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from train.errors import UserError
from train.sharding import make_mesh, mesh_shape

ROOT = Path(train.__file__).parents[1]


def sizes(data=1, fsdp=1, tensor=1, sequence=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}


def test_mesh_shape():
    assert mesh_shape(sizes(data=-1), 8) == (8, 1, 1, 1)
    assert mesh_shape(sizes(data=2, tensor=-1), 8) == (2, 1, 4, 1)
    assert mesh_shape(sizes(2, 2, 1, 2), 8) == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (sizes(data=3), "do not multiply to the number of devices, 8"),
        (sizes(data=-1, fsdp=3), "do not multiply"),
        (sizes(data=4), "do not multiply"),
        (sizes(data=-1, fsdp=-1), "one of them may be -1"),
        (sizes(data=0), "each must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(shape, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(shape, 8)


def test_a_mesh_of_one():
    mesh = make_mesh(sizes(data=-1), batch_size=3)
    assert dict(mesh.shape) == sizes()


# Runs where JAX was told to make four devices of the CPU, which it can be told only before it starts.
SCRIPT = """
import json, sys
import flax.linen as nn, jax, numpy as np
from pathlib import Path
from train.configuration import apply_overrides, load_config
from train.errors import UserError
from train.data import training_batches
from train.loop import build
from train.sharding import RULES, make_mesh

jax.config.update("jax_disable_most_optimizations", True)  # compilation is nearly all that this costs

def two_steps(**mesh_sizes):
    config = load_config("configs/2mamba.py")
    values = json.loads(sys.argv[1]) | {f"mesh.{axis}": size for axis, size in mesh_sizes.items()}
    apply_overrides(config, [(key, str(value)) for key, value in values.items()])
    mesh = make_mesh(config.mesh, config.batch_size)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        run = build(config, Path("unused"), mesh)
        state = run.init(jax.random.key(0))
        batches = training_batches(run.task.train, config.batch_size, 0)
        losses = []
        for _ in range(2):
            state, metrics = run.train_step(state, next(batches))
            losses.append(float(metrics["loss"]))
        batches.close()
        eval_loss = run.evaluate(state.params)["eval/loss"]
    flat, _ = jax.tree_util.tree_flatten_with_path(state.params)
    shapes = {jax.tree_util.keystr(path): [leaf.shape, leaf.sharding.shard_shape(leaf.shape)] for path, leaf in flat}
    return {
        "losses": losses + [eval_loss],
        "devices": mesh.size,
        "shapes": shapes,
        "moments": all(
            mine.sharding == other.sharding
            for mine, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state[1][0].mu))
        ),
    }

results = {"data": two_steps(data=-1), "mixed": two_steps(data=1, fsdp=2, tensor=2)}
try:
    make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}, 6)
except UserError as error:
    results["error"] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def on_four_devices(tiny, tmp_path_factory):
    overrides = [argument.removeprefix("--config.").split("=", 1) for argument in tiny(Path("unused"))[4:]]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(dict(overrides))]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_data_parallel_replicates_the_parameters(on_four_devices):
    result = on_four_devices["data"]
    assert result["devices"] == 4
    assert all(whole == part for whole, part in result["shapes"].values())


def test_fsdp_and_tensor_axes_cut_the_parameters_where_the_rules_say(on_four_devices):
    result = on_four_devices["mixed"]
    embedding = next(shapes for name, shapes in result["shapes"].items() if "embed" in name.lower())
    assert embedding == [[512, 16], [256, 8]]  # vocab over tensor=2, embed over fsdp=2
    whole, part = (sum(math.prod(shapes[i]) for shapes in result["shapes"].values()) for i in (0, 1))
    assert part < 0.5 * whole
    assert result["moments"]


def test_the_mesh_changes_rounding_only(on_four_devices):
    assert on_four_devices["mixed"]["losses"] == pytest.approx(on_four_devices["data"]["losses"], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused(on_four_devices):
    assert "batch_size=6 must be a multiple of mesh.data x mesh.fsdp = 4" in on_four_devices["error"]
