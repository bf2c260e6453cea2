"""Prints the loss of the third step, made on each of some numbers of devices from one checkpoint, as JSON.

Arguments: a directory, and the numbers. The first one makes the checkpoint, of its second step; each of the others
claims the directory as its own.
"""

import json
import math
import sys
from contextlib import closing
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import AxisType
from support import garbage

from train.checkpoint import Checkpoints
from train.configuration import apply_overrides, load_config
from train.data.rows import training_batches
from train.loop import build, make_workdir
from train.sharding import MESH_AXES, RULES, mesh_shape

SIZES = {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "vocab_size": 96}
MESHES = {8: {"fsdp": 8}, 4: {"fsdp": 2, "tensor": 2}, 1: {}}


def third_step(devices, workdir):
    """The loss of step 3 on so many devices, from the checkpoint in `workdir`; where there is none, it is made."""
    config = load_config("configs/2mamba_recall.py")
    changes = {f"model.{key}": size for key, size in SIZES.items()} | {"batch_size": 8}
    changes |= {"execution.remat": "none", "variant": "softmax"}  # less to compile
    changes |= {f"mesh.{axis}": MESHES[devices].get(axis, 1) for axis in MESH_AXES}
    apply_overrides(config, [(key, str(value)) for key, value in changes.items()])
    shape = mesh_shape(config.mesh, devices)
    mesh = jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 4, devices=jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), closing(Checkpoints(workdir, keep=1)) as checkpoints:
        run = build(config, workdir, mesh)
        make_workdir(run)
        batches = training_batches(run.task.train, config.batch_size, config.seed)
        restored = checkpoints.restore(run.abstract, print)
        if restored is None:
            state = run.init(jax.random.key(0))
            for _ in range(2):
                state, _ = run.train_step(state, run.place(next(batches)))
            checkpoints.save(state, batches.get_state())
        else:
            state, position = restored
            batches.set_state(position)
        state, metrics = run.train_step(state, run.place(next(batches)))
        batches.close()
    assert int(state.step) == 3
    return float(metrics["loss"])


if __name__ == "__main__":
    garbage.collect_less()
    workdir, *counts = sys.argv[1:]
    print(json.dumps({count: third_step(int(count), Path(workdir)) for count in counts}))
