"""Generation on meshes of 8 devices against that on one, as JSON.

For each variant, with rows and heads over devices: whether greedy `tokens` are those of one device, and how many `rows`
of them differ; of its logits the `error`, and the `gap` between the two likeliest tokens, both over the largest logit
and float32's epsilon; of each array of the last cache its shape and that of a device's part (`shapes`); whether all
caches were given away (`donated`); and the elements of the largest array that devices exchange (`sent`) in the prefill
and for a token. With a mesh that cuts tokens as well: whether `generate` gives the same tokens (`sequence`).
"""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from support import garbage
from support.exhaustive import EXHAUSTIVE
from support.models import config_of, params_of

from train.sharding import MESH_AXES, RULES, make_mesh, tree_shardings
from twomamba_jax import LanguageModel, generate, init_cache
from twomamba_jax.generation import decode_loop, prefill_pieces

NAMES = ("2mamba", "softmax", *(["2mamba-e", "mamba2", "mamba2-released"] if EXHAUSTIVE else []))
SEQUENCE = ("2mamba", "softmax") if EXHAUSTIVE else ()  # in every run: test_sequence.py
LENGTHS, NEW, FOLD = np.array([7, 2, 5, 1, 4, 7, 6, 3]), 10, 3  # at least three folds, the rows' at different steps
TOKENS = np.random.default_rng(1).integers(24, size=(8, 7))
SHAPE = 8, 7 + NEW
COLLECTIVE = re.compile(r"= (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(")


def greedy(model, params):
    """Tokens [B, N], logits [B, N + 1, vocab], the last cache, whether all were donated, and both compiled programs.

    That of a token refuses a cache that it has left on other devices than it found it.
    """
    empty = init_cache(model.config, *SHAPE, fold_size=FOLD)
    read = prefill_pieces.lower(model, params, TOKENS, empty, LENGTHS, None, ()).compile()
    state = read(params, TOKENS, empty, LENGTHS)
    stop_tokens = jnp.zeros((0,), jnp.int32)
    step = decode_loop.lower(model, params, state, 1, 0.0, None, None, stop_tokens, ()).compile()
    tokens, logits, given = [], [np.array(state.logits)], jax.tree.leaves(empty)
    for _ in range(NEW):
        given += jax.tree.leaves(state.cache)
        new, state = step(params, state, 0.0, None, stop_tokens)
        tokens.append(new.tokens)
        logits.append(np.array(state.logits))
    donated = all(leaf.is_deleted() for leaf in given)
    return np.concatenate(tokens, axis=1), np.stack(logits, axis=1), state.cache, donated, (read, step)


def largest_exchange(compiled) -> int:
    """The elements of the largest array that a device has from the others."""
    arrays = re.findall(r"\w+\[([\d,]*)\]", " ".join(COLLECTIVE.findall(compiled.as_text())))
    return max(int(np.prod([int(size) for size in sizes.split(",") if size])) for sizes in arrays)


def compare(name) -> dict:
    model = LanguageModel(config_of(name, vocab_size=24))
    boxed = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = params_of(model)
    tokens, logits, *_ = greedy(model, params)
    unit = np.finfo(np.float32).eps * np.abs(logits).max(axis=-1)
    *_, second, first = np.moveaxis(np.sort(logits, axis=-1), -1, 0)
    result = {"rows": len(np.unique(tokens, axis=0)), "gap": float(((first - second) / unit).min())}

    mesh = make_mesh(dict(zip(MESH_AXES, (4, 1, 2, 1))))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        ours, our_logits, cache, donated, programs = greedy(model, jax.device_put(params, tree_shardings(boxed, mesh)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    result |= {
        "tokens": bool((ours == tokens).all()),
        "error": float((np.abs(our_logits - logits).max(axis=-1) / unit).max()),
        "shapes": {
            jax.tree_util.keystr(path): [leaf.shape, leaf.sharding.shard_shape(leaf.shape)] for path, leaf in leaves
        },
        "donated": donated,
        "sent": [largest_exchange(program) for program in programs],
    }
    if name in SEQUENCE:
        mesh = make_mesh(dict(zip(MESH_AXES, (2, 1, 2, 2))))
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            params = jax.device_put(params, tree_shardings(boxed, mesh))
            ours = generate(model, params, TOKENS, lengths=LENGTHS, max_new_tokens=NEW, fold_size=FOLD).tokens
        result["sequence"] = bool((np.asarray(ours) == tokens).all())
    return result


if __name__ == "__main__":
    garbage.collect_less()
    print(json.dumps({name: compare(name) for name in NAMES}))
