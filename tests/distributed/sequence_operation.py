"""The operation with its tokens sharded over devices: against the oracle, and packed documents against the same alone.

Prints JSON: for each case the largest error of each result relative to its largest entry, in float64.
"""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from support import garbage, oracle
from support.cases import VALUE_DIM, Case
from support.exhaustive import EXHAUSTIVE

from twomamba_jax import FiniteState, KeyValueCache, decay_attention
from twomamba_jax.ops.sequence import SequenceAxis

# Six tokens to each of eight devices, twenty-four to each of two.
TOKENS = 48
AXES = ("data", "tensor", "sequence")
SEQUENCE_8, MIXED = (1, 1, 8), (2, 2, 2)
PARTITION = PartitionSpec("data", "sequence", "tensor", None)

# (case, mesh, form); chunks of four tokens, which leave padding at the end of each device's.
WHOLE = {"heads": (4, 2), "head_dim": 4, "tokens": TOKENS, "initial_state": True}
EMPTY = WHOLE | {"initial_state": False}
CASES = {
    "linear": (Case("linear", segments=True, **WHOLE), SEQUENCE_8, "chunked"),
    "linear, mixed": (Case("linear", normalize=False, decay=False, **WHOLE), MIXED, "recurrent"),
    "squared": (Case("squared", segments=True, lengths=True, **WHOLE), SEQUENCE_8, "chunked"),
    "squared, unnormalised": (Case("squared", normalize=False, segments=True, **WHOLE), SEQUENCE_8, "parallel"),
    "squared, no decay, mixed": (Case("squared", decay=False, segments=True, **WHOLE), MIXED, "chunked"),
    "exp": (Case("exp", segments=True, lengths=True, **WHOLE), SEQUENCE_8, "chunked"),
    "exp, no segments": (Case("exp", **WHOLE), SEQUENCE_8, "chunked"),
    "exp, unnormalised, no decay, mixed": (Case("exp", normalize=False, decay=False, **EMPTY), MIXED, "parallel"),
}

if not EXHAUSTIVE:  # a state that is passed on, and a cache; other axes beside them are in test_meshes.py
    CASES = {name: CASES[name] for name in ("squared", "exp")}

PACKED = ("squared", "exp") if EXHAUSTIVE else ()

# Documents that begin at, before and after the edges of devices, and span several of them or none.
DOCUMENTS = (5, 1, 1, 5, 13, 6, 10, 1, 6)


def on_mesh(sizes):
    return jax.set_mesh(jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3))


def error(got, want):
    scale = np.abs(want).max(initial=0)
    return float(np.abs(np.asarray(got, np.float64) - want).max(initial=0) / (scale or 1))


def rows_of(tree):
    """The first two of the three rows: an even number."""
    return jax.tree.map(lambda x: x[:2], tree)


def errors(case: Case, sizes, form):
    """Of the outputs, the final state and every gradient, against the oracle."""
    arrays = rows_of(case.arrays())
    inputs = [arrays[name] for name in ("q", "k", "v", "log_decay")]
    rows = {name: arrays[name] for name in ("segment_ids", "lengths")}
    options = {"score": case.score, "normalize": case.normalize}
    want, want_final = oracle.forward(*inputs, initial_state=arrays["state"], **options, **rows)
    rng = np.random.default_rng(1)
    dy = rng.normal(size=want.shape)
    finite = case.score != "exp"
    dfinal = tuple(rng.normal(size=x.shape) for x in want_final) if finite else None
    want_gradients = oracle.gradients(dy, dfinal, *inputs, initial_state=arrays["state"], **options, **rows)
    state = arrays["state"]
    if state is not None:
        state = FiniteState(*state) if finite else KeyValueCache(**state)
    counters = {} if finite or state is None else {"start": state.start, "length": state.length}

    def loss(q, k, v, log_decay, state):
        if counters:
            state = state._replace(**counters)
        y, final = decay_attention(
            q,
            k,
            v,
            log_decay,
            **options,
            **jax.tree.map(jnp.asarray, rows),
            initial_state=state,
            return_final_state=True,
            form=form,
            chunk_size=4 if form == "chunked" else None,
            partition=PARTITION,
        )
        total = (y * dy).sum()
        if finite:
            total += sum((x * dx).sum() for x, dx in zip(final, dfinal))
        return total, (y, final)

    if counters:
        state = state._replace(start=None, length=None)
    arguments = jax.tree.map(jnp.asarray, (*inputs, state))
    with on_mesh(sizes):
        gradients, (y, final) = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*arguments)
    found = {"y": error(y, want)}
    if finite:
        found |= {name: error(x, w) for name, x, w in zip(("kv", "key_sum"), final, want_final)}
    else:
        used = np.arange(final.keys.shape[2]) < want_final["length"][:, None]
        found["start"] = error(final.start, want_final["start"])
        if final.log_decay is not None:
            decays = [np.moveaxis(np.asarray(x), 2, 1)[used] for x in (final.log_decay, want_final["log_decay"])]
            found["log_decay"] = error(*decays)
    named = dict(zip(("q", "k", "v", "log_decay"), gradients))
    if state is not None:
        named |= {f"initial_{name}": x for name, x in gradients[4]._asdict().items()}
    return found | {f"d{name}": error(named[name], x) for name, x in want_gradients.items()}


def packed(score):
    """How far packed documents are from the oracle's of each alone, and the gradients that cross to another."""
    q, k, v, log_decay = (jnp.asarray(x[:1]) for x in list(Case(score, **WHOLE).arrays().values())[:4])
    ends = np.cumsum(DOCUMENTS)
    ids = jnp.asarray(np.searchsorted(ends, np.arange(TOKENS), side="right")[None])
    spans = [slice(end - size, end) for end, size in zip(ends, DOCUMENTS)]
    attend = functools.partial(decay_attention, score=score, chunk_size=4, partition=PARTITION)
    apart = [
        oracle.forward(*(x[:, span] for x in (q, k, v, log_decay)), score=score, normalize=True)[0] for span in spans
    ]
    with on_mesh(SEQUENCE_8):

        @jax.jit
        def gradients(dy):
            y, pull = jax.vjp(functools.partial(attend, segment_ids=ids), q, k, v, log_decay)
            return y, pull(dy)

        crossing = []
        for span in spans:
            y, found = gradients(jnp.zeros_like(q[..., :VALUE_DIM]).at[:, span].set(1))
            crossing.append([float(np.abs(np.delete(x, np.r_[span], axis=1)).max()) for x in found])
    difference = max(error(y[:, span], want) for span, want in zip(spans, apart))
    return {"difference": difference, "crossing": np.max(crossing)}


def entering() -> float:
    """The largest error of the states that enter devices of which each makes two steps, one or the other way."""
    rng, errors = np.random.default_rng(0), []
    for devices, reverse, has_initial in itertools.product((2, 3, 5, 8), (False, True), (False, True)):
        mesh = jax.make_mesh((devices,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        weights, added = rng.uniform(size=(2 * devices, 1, 1)), rng.normal(size=(2 * devices, 1, 1, 3))
        first = rng.normal(size=added.shape[1:]) if has_initial else None
        state, want = np.zeros(added.shape[1:]) if first is None else first, np.empty((devices, *added.shape[1:]))
        for step in reversed(range(2 * devices)) if reverse else range(2 * devices):
            if step % 2 == int(reverse):
                want[step // 2] = state
            state = weights[step, ..., None] * state + added[step]
        enter = functools.partial(SequenceAxis("a", devices).enter, initial=first, reverse=reverse)
        shards = jax.shard_map(
            lambda *x, enter=enter: enter(*x)[None],
            mesh=mesh,
            in_specs=PartitionSpec("a"),
            out_specs=PartitionSpec("a"),
            check_vma=False,
        )
        errors.append(error(jax.jit(shards)(weights, added), want))
    return max(errors)


if __name__ == "__main__":
    garbage.collect_less()
    with jax.enable_x64(True):
        states = entering()
        cases = {name: errors(*case) for name, case in CASES.items()}
        documents = {score: packed(score) for score in PACKED}
    print(json.dumps({"entering": states, "cases": cases, "packed": documents}))
