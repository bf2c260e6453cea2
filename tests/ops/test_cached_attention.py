"""The operation with a cache, as a layer of one's own calls it: a prompt, a piece and single tokens."""

import functools

import jax
import numpy as np
import pytest

from twomamba_jax import cached_attention, decay_attention, init_decoding_cache

TOKENS, PIECES = 13, (6, 3, 1, 1, 1, 1)  # of which the first is longer than what waits, and the others fold


@pytest.mark.parametrize("score", ["squared", "exp"])
def test_pieces_of_any_size_are_the_whole(score):
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 2, TOKENS, 2, 4)).astype(np.float32)
    log_decay = -draw.exponential(0.1, (2, TOKENS, 2)).astype(np.float32)
    whole = jax.jit(functools.partial(decay_attention, score=score))(q, k, v, log_decay)
    cache = init_decoding_cache(score, 2, 2, 4, 4, capacity=TOKENS if score == "exp" else None, fold_size=3)
    step = jax.jit(functools.partial(cached_attention, score=score))
    found, start = [], 0
    for size in PIECES:
        y, cache = step(*(x[:, start : start + size] for x in (q, k, v, log_decay)), cache)
        found.append(y)
        start += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=2e-5, atol=2e-5)
    assert cache.length.tolist() == [TOKENS] * 2


def test_a_cache_of_another_score_is_refused():
    q = np.ones((1, 1, 2, 4), np.float32)
    cache = init_decoding_cache("squared", 1, 2, 4, 4)
    with pytest.raises(ValueError, match="score='exp' continues a KeyValueCache, got RecurrentCache"):
        cached_attention(q, q, q, None, cache, score="exp")
