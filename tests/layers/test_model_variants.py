"""Every variant builds, learns, and gives the same logits whether its tokens come at once or singly.

All of them do that in an exhaustive run; in others those in which every value of every setting is met.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exhaustive import EXHAUSTIVE

from twomamba_jax import VARIANTS, LanguageModel, ModelConfig, init_cache

SIZES = {"vocab_size": 23, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48}
LENGTH, PREFILL, FOLD = 17, 5, 4  # the steps fold three times
TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH + 1), 0, 23)

# Rounding, as a multiple of float32's epsilon times the largest logit of the token. The ways to a logit differ in the
# order of their sums alone: a dozen a block, each off by a few epsilon of its terms, and those of a squared score
# through its state by the conditioning of the row (numerics contract, point 4) more. Measured: at most 5 after
# training, whatever the variant. A lost convolution tap or a state that is off by one token shows as 1e4 and more.
ROUNDING = 32


def model_of(pattern):
    mixers = tuple(VARIANTS[name].mixer for name in pattern.split(","))
    return LanguageModel(ModelConfig(num_layers=len(mixers), mixers=mixers, **SIZES))


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


def covering():
    """The named models, and of the other variants those with a value of a setting that none before them has.

    The latter are layers of one model.
    """
    named, others, seen = list(VARIANTS)[:6], [], set()
    for name, variant in VARIANTS.items():
        settings = dataclasses.asdict(variant.mixer)
        values = set((settings | {"qk_dim": settings["qk_dim"] is None}).items())  # one size for all
        if name not in named and values - seen:
            others.append(name)
        if name in named or values - seen:
            seen |= values
    return [*named, ",".join(others)]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_builds(name):
    logits = jax.eval_shape(lambda: model_of(name).init_with_output(jax.random.key(0), TOKENS)[0])
    assert logits.shape == (*TOKENS.shape, SIZES["vocab_size"])


@pytest.mark.parametrize("pattern", VARIANTS if EXHAUSTIVE else covering())
def test_variant_learns_and_continues_from_its_cache(pattern):
    model = model_of(pattern)
    before, after, losses = train(model, TOKENS)
    assert losses[0] == pytest.approx(np.log(23), abs=0.1)  # nothing is known at first
    assert (np.diff(losses) < 0).all()
    assert losses[-1] < (0.7 if model.config.num_layers == 1 else 0.75) * losses[0]
    # A memoryless layer has one weight per row, which the norm divides by itself.
    still = [f"['layers_{n}']" for n, name in enumerate(pattern.split(",")) if name == "memoryless"]
    assert not [path for path in unmoved(before, after) if not path.startswith(tuple(still))]

    full, singles = two_ways(model, after, TOKENS[:, :-1])
    assert_same_logits(singles, full)
