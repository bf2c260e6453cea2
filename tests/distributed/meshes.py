"""Prints how the training step of variants on meshes of 8 devices differs from that on one device, as JSON.

For each pair of a variant and a mesh: `loss`, `gradients` and `parameters` (after one step of SGD), the largest
difference over the largest magnitude, of all leaves the worst; `shapes`, of each leaf of the state behind the step its
shape and that of a device's part; `scratch`, the bytes of a device's temporaries over those of one device alone.
"""

import itertools
import json
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType
from support import garbage

from train.configuration import apply_overrides, build_model, load_config
from train.data.rows import make_row
from train.sharding import MESH_AXES, RULES, batch_sharding, check_dimensions, make_mesh
from train.step import make_init, make_train_step

ROWS, LENGTH = 8, 32
SIZES = {"d_model": 32, "num_layers": 1, "num_heads": 4, "head_dim": 16, "mlp_dim": 64, "vocab_size": 64}
RATE = 0.5


def configure(variant, mesh):
    config = load_config("configs/2mamba.py")
    changes = {f"model.{key}": size for key, size in SIZES.items()} | {"batch_size": ROWS, "length": LENGTH}
    changes["execution.remat"] = "none"  # compilation is what this costs
    changes["model.tie_embeddings"] = variant == "mamba2-released"
    changes |= {f"mesh.{axis}": mesh.get(axis, 1) for axis in MESH_AXES} | {"variant": variant}
    apply_overrides(config, [(key, str(value)) for key, value in changes.items()])
    return config


def make_batch():
    """Rows of three documents, with boundaries anywhere."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        segments = 1 + np.searchsorted(np.sort(draw.integers(0, LENGTH, 2)), np.arange(LENGTH + 1), "right")
        rows.append(make_row(draw.integers(0, SIZES["vocab_size"], LENGTH + 1), segments, LENGTH, 0))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def step_on(mesh, config, state, batch):
    """The state before one step (made where it is None), the loss, the state behind it, and the compiled step."""
    check_dimensions(config, mesh)
    # A momentum of 0 keeps the gradients in the optimiser's state: one compiled step tells all.
    optimizer = optax.sgd(RATE, momentum=0.0)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        model = build_model(config)
        init, abstract = make_init(model, optimizer, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = init(jax.random.key(0)) if state is None else jax.device_put(state, shardings)
        start = jax.tree.map(np.asarray, state)  # the step is given the state itself
        batch = jax.device_put(batch, batch_sharding(mesh))
        step = make_train_step(model, optimizer, lambda _: RATE, abstract, mesh).lower(state, batch).compile()
        state, metrics = step(state, batch)
    return start, float(metrics["loss"]), state, step


def worst(ours, theirs):
    """The largest difference over the largest magnitude, of all leaves the worst.

    A leaf that is rounding alone is measured by the largest of all: 2mamba-e's gradient of the bias of the keys'
    convolution is 0, since a softmax does not see what is added to all its logits.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))

    def difference(a, b):
        magnitude = np.abs(b).max()
        return float(np.abs(np.asarray(a) - b).max() / (magnitude if magnitude > 1e-7 * largest else largest))

    return max(jax.tree.leaves(jax.tree.map(difference, ours, theirs)))


def temporaries(step):
    return step.memory_analysis().temp_size_in_bytes


def main(meshes, cases):
    batch, results = make_batch(), {}
    alone = jax.make_mesh((1,) * 4, MESH_AXES, (AxisType.Auto,) * 4, devices=jax.devices()[:1])
    for variant, names in itertools.groupby(cases, key=lambda case: case[0]):
        start, loss, state, step = step_on(alone, configure(variant, {}), None, batch)
        expected = jax.tree.map(np.asarray, state)
        for _, name in names:
            config = configure(variant, meshes[name])
            _, our_loss, ours, our_step = step_on(make_mesh(config.mesh), config, start, batch)
            leaves, _ = jax.tree_util.tree_flatten_with_path(ours)
            results[f"{variant} {name}"] = {
                "loss": abs(our_loss - loss) / loss,
                "gradients": worst(ours.opt_state[0].trace, expected.opt_state[0].trace),
                "parameters": worst(ours.params, expected.params),
                "scratch": temporaries(our_step) / temporaries(step),
                "shapes": {
                    jax.tree_util.keystr(path): [leaf.shape, leaf.sharding.shard_shape(leaf.shape)]
                    for path, leaf in leaves
                },
            }
    print(json.dumps(results))


if __name__ == "__main__":
    garbage.collect_less()
    main(*map(json.loads, sys.argv[1:]))
