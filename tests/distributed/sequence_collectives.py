"""What the devices say to each other in the gradient of models, their tokens sharded over eight of them.

Prints JSON: for each model the bytes that each kind of collective leaves on a device.
"""

import collections
import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import garbage

from train.sharding import MESH_AXES, RULES
from twomamba_jax import LanguageModel, ModelConfig, parse_pattern

NAMES = ("2mamba", "2mamba-e", "mamba2")
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


def compile_on_mesh(name, tokens):
    """The loss and its gradients, of packed rows, compiled."""
    sizes = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    model = LanguageModel(ModelConfig(mixers=parse_pattern(name, 1), num_layers=1, **sizes))

    def loss(params, tokens, targets, segment_ids):
        logits = model.apply(params, tokens, segment_ids=segment_ids)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()

    mesh = jax.make_mesh((1, 1, 1, 8), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "sequence"), PartitionSpec()))
        ids = jax.ShapeDtypeStruct((BATCH, tokens), jnp.int32)
        params = jax.eval_shape(lambda key, ids: nn.unbox(model.init(key, ids)), jax.random.key(0), ids)
        step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, rows, rows, rows), out_shardings=whole)
        return step.lower(params, ids, ids, ids).compile()


if __name__ == "__main__":
    garbage.collect_less()
    found = {name: collectives(compile_on_mesh(name, TOKENS)) for name in NAMES}
    found["2mamba of twice the tokens"] = collectives(compile_on_mesh("2mamba", 2 * TOKENS))
    print(json.dumps(found))
