"""What the devices say to one another in a step of two microbatches, and in the loss alone: see test_step.py."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import garbage
from support.models import model_of

from train.cross_entropy import cross_entropy
from train.sharding import MESH_AXES, RULES, batch_sharding, make_mesh, token_shards
from train.step import make_init, make_train_step
from twomamba_jax.ops import softmax_rows

BATCH, LENGTH, WIDTH, VOCAB, CHUNK = 16, 32, 16, 64, 4
COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


def collectives(compiled) -> list[dict]:
    """The kind of each, whether it is in a loop, and the dtype and number of elements of each of its results."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"])
            sizes = [(dtype, int(np.prod([int(size) for size in shape.split(",") if size]))) for dtype, shape in arrays]
            found.append({"kind": match["kind"], "loop": "while/body" in line, "arrays": sizes})
    return found


def batch(vocab: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tokens, targets = random.integers(vocab, size=(2, BATCH, LENGTH)).astype(np.int32)
    weights = (np.arange(LENGTH) < random.integers(LENGTH, size=BATCH)[:, None]).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "segment_ids": tokens // 20, "weights": weights}


DATA = batch(VOCAB)
ARRAYS = (
    jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH)),
    jax.random.normal(jax.random.key(1), (WIDTH, VOCAB)),
    jnp.asarray(DATA["targets"]),
    jnp.asarray(DATA["weights"]),
)


def differentiated(chunk_size: int | None = None, shards: tuple[int, int] = (1, 1)):
    """A function from the arrays to the sums and the gradients."""

    def loss(*arrays):
        sums = cross_entropy(*arrays, chunk_size, shards)
        return sums.loss, sums

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def figures(result) -> list[list[float]]:
    """The sums, and of each gradient some that no two gradients are likely to share."""
    (_, sums), gradients = result
    return [np.asarray(sums).tolist(), *(np.asarray(leaf).ravel()[::97].tolist() for leaf in gradients)]


def the_loss(*sizes: int) -> dict:
    """The loss and its gradients over a mesh of these sizes; each device has several chunks of tokens."""
    mesh = make_mesh(dict(zip(MESH_AXES, sizes)))
    tokens = batch_sharding(mesh)
    places = NamedSharding(mesh, P(*tokens.spec, None)), NamedSharding(mesh, P("fsdp", "tensor"))
    places = (*places, tokens, tokens)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        function = jax.jit(
            differentiated(CHUNK, token_shards(mesh)), in_shardings=places, out_shardings=(None, places[:2])
        )
        compiled = function.lower(*ARRAYS).compile()
        result = compiled(*jax.device_put(ARRAYS, places))
    return {"collectives": collectives(compiled), "figures": figures(result)}


def the_step(microbatches: int, *sizes: int) -> dict:
    """A step of SGD."""
    mesh, model, optimizer = make_mesh(dict(zip(MESH_AXES, sizes))), model_of("linear"), optax.sgd(1.0)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        init, abstract = make_init(model, optimizer, mesh)
        step = make_train_step(model, optimizer, lambda _: 1.0, abstract, mesh, CHUNK, microbatches)
        data = jax.device_put(batch(23), batch_sharding(mesh))
        state = init(jax.random.key(0))
        compiled = step.lower(state, data).compile()
        _, metrics = compiled(state, data)
    return {"collectives": collectives(compiled), "metrics": [float(metrics[key]) for key in ("loss", "grad_norm")]}


def in_one_pass(function, *arguments):
    """The function's result with rows of logits read in one pass, as on GPUs."""
    passes, softmax_rows.in_several_passes = softmax_rows.in_several_passes, softmax_rows.in_one_pass
    try:
        return function(*arguments)
    finally:
        softmax_rows.in_several_passes = passes


garbage.collect_less()
print(
    json.dumps(
        {
            "alone": figures(jax.jit(differentiated())(*ARRAYS)),
            "rows": the_loss(2, 4, 1, 1),
            "all axes": the_loss(1, 2, 2, 2),
            "one pass": in_one_pass(the_loss, 1, 2, 2, 2),
            "steps": [the_step(1, 2, 4, 1, 1), the_step(2, 2, 4, 1, 1)],
        }
    )
)
