"""The named models with their tokens spread over eight devices, against one device, and what the devices say.

Prints JSON: for each model its loss on the mesh and on one device, the largest difference of each gradient and its
largest entry, and the bytes that each kind of collective leaves on a device.
"""

import collections
import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.sharding import MESH_AXES, RULES
from twomamba_jax import LanguageModel, ModelConfig, parse_pattern

NAMES = ("2mamba", "2mamba-e", "mamba2", "mamba2s", "linear", "softmax")
BATCH, TOKENS, VOCAB = 2, 64, 32
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\(")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(compiled) -> dict[str, int]:
    """Bytes of the results of each kind of collective in a compiled program, loops counted once."""
    found = collections.Counter()
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            found[kind] += BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
    return dict(found)


class Problem:
    """A model of one layer with random parameters, and packed rows of random tokens."""

    def __init__(self, name, tokens):
        sizes = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
        self.model = LanguageModel(ModelConfig(mixers=parse_pattern(name, 1), num_layers=1, **sizes))
        rng = np.random.default_rng(0)
        # Segments that begin at the edges of devices and elsewhere, and that span several devices.
        starts = rng.choice(tokens, size=(BATCH, 5), replace=False)
        starts[:, 0] = tokens // 4
        segment_ids = (np.arange(tokens) >= starts[..., None]).sum(1)
        self.batch = [*rng.integers(0, VOCAB, (2, BATCH, tokens)), segment_ids]
        shapes = nn.unbox(jax.eval_shape(self.model.init, jax.random.key(0), self.batch[0]))
        self.params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, shapes)

    def loss(self, params, tokens, targets, segment_ids):
        logits = self.model.apply(params, tokens, segment_ids=segment_ids)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()

    def on_one_device(self):
        return jax.jit(jax.value_and_grad(self.loss))(self.params, *self.batch)

    def on_mesh(self):
        """The compiled program and its arguments."""
        mesh = jax.make_mesh((1, 1, 1, 8), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "sequence"), PartitionSpec()))
            arguments = jax.device_put((self.params, *self.batch), (whole, rows, rows, rows))
            step = jax.jit(jax.value_and_grad(self.loss), out_shardings=whole)
            return step.lower(*arguments).compile(), arguments


def compare(name):
    problem = Problem(name, TOKENS)
    want_loss, want = problem.on_one_device()
    compiled, arguments = problem.on_mesh()
    loss, got = compiled(*arguments)
    leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want))
    gradients = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [float(abs(x - y).max()), float(abs(y).max())]
        for (path, x), y in leaves
    }
    return {
        "loss": [float(loss), float(want_loss)],
        "gradients": gradients,
        "collectives": collectives(compiled),
    }


if __name__ == "__main__":
    models = {name: compare(name) for name in NAMES}
    longer = collectives(Problem("2mamba", 2 * TOKENS).on_mesh()[0])
    print(json.dumps({"models": models, "longer": longer}))
