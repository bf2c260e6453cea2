"""Every variant builds, learns, and gives the same logits whether its tokens come at once or singly.

All of them do that in an exhaustive run. In others those in which the values of settings are met give the same logits
as layers of one model, and the paper's does in test_cache.py.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.models import SIZES, config_of, params_of

from twomamba_jax import VARIANTS, LanguageModel, init_cache

LENGTH, PREFILL, FOLD = 17, 5, 4  # the steps fold three times
TOKENS = np.random.default_rng(0).integers(23, size=(2, LENGTH + 1))

# Rounding, as a multiple of float32's epsilon times the largest logit of the token. The ways to a logit differ in the
# order of their sums alone: a dozen a block, each off by a few epsilon of its terms, and those of a squared score
# through its state by the conditioning of the row (numerics contract, point 4) more. Measured: at most 5 after
# training, whatever the variant. A lost convolution tap or a state that is off by one token shows as 1e4 and more.
ROUNDING = 32


def model_of(pattern):
    return LanguageModel(config_of(pattern, num_layers=len(pattern.split(","))))


@functools.partial(jax.jit, static_argnums=0)
def train(model, tokens):
    """Eight steps on one batch; returns the parameters before and after, and the losses."""
    optimizer = optax.flatten(optax.adam(1e-2))  # on one vector: less to compile
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss(params):
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    before = nn.unbox(model.init(jax.random.key(1), inputs)["params"])
    (after, _), losses = jax.lax.scan(step, (before, optimizer.init(before)), length=8)
    return before, after, losses


@functools.partial(jax.jit, static_argnums=0)
def two_ways(model, params, tokens):
    """The logits of one pass, and of a prefill followed by single steps."""
    apply = functools.partial(model.apply, {"params": params})
    cache = init_cache(model.config, *tokens.shape, fold_size=FOLD)
    head, cache = apply(tokens[:, :PREFILL], cache=cache)

    def step(cache, token):
        logits, cache = apply(token[:, None], cache=cache)
        return cache, logits[:, 0]

    _, steps = jax.lax.scan(step, cache, tokens[:, PREFILL:].T)
    return apply(tokens), jnp.concatenate([head, jnp.moveaxis(steps, 0, 1)], axis=1)


def assert_same_logits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    bound = ROUNDING * np.finfo(np.float32).eps * np.abs(expected).max(axis=-1, keepdims=True)
    excess = np.abs(actual - expected) / bound
    assert np.isfinite(expected).all()
    assert excess.max() <= 1, f"{excess.max() * ROUNDING:.3g} epsilon of a token's largest logit"


def unmoved(before, after):
    """The parameters in which not one number changed."""
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    return {jax.tree_util.keystr(path) for path, equal in jax.tree.leaves_with_path(same) if equal}


CACHED = ["2mamba", "softmax", "mamba2-released"]  # they continue in test_cache.py


def covering():
    """Of the variants that are not in the list above, those with a value of a setting that none before them has."""
    others, seen, listed = [], set(), CACHED
    for name in [*listed, *VARIANTS]:
        settings = dataclasses.asdict(VARIANTS[name].mixer)
        values = set((settings | {"qk_dim": settings["qk_dim"] is None}).items())  # one size for all
        if name not in listed and values - seen:
            others.append(name)
        if name in listed or values - seen:
            seen |= values
    return others


OTHERS = covering()


@exhaustive("test_every_variant_names_every_axis, which builds each alone")
def test_every_variant_builds():
    """As layers of one model."""
    model = model_of(",".join(VARIANTS))
    logits, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), TOKENS))
    assert logits.shape == (*TOKENS.shape, SIZES["vocab_size"])
    assert len(variables["params"]) == len(VARIANTS) + 3  # embedding, norm and head


@exhaustive("runs that learn in train/test_loop.py, and the layers below and in test_cache.py")
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_learns_and_continues_from_its_cache(name):
    model = model_of(name)
    before, after, losses = train(model, TOKENS)
    assert losses[0] == pytest.approx(np.log(23), abs=0.1)  # nothing is known at first
    assert (np.diff(losses) < 0).all()
    assert losses[-1] < 0.7 * losses[0]
    if VARIANTS[name].mixer.decay != "memoryless":  # it has one weight per row, which the norm divides by itself
        assert not unmoved(before, after)

    full, singles = two_ways(model, after, TOKENS[:, :-1])
    assert_same_logits(singles, full)


@pytest.mark.skipif(EXHAUSTIVE, reason="each of them alone does so above")
def test_layers_of_other_variants_continue_from_their_caches():
    model = model_of(",".join(OTHERS))
    full, singles = two_ways(model, params_of(model), TOKENS[:, :-1])
    assert_same_logits(singles, full)
