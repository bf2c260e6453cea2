"""Inputs for the operation's tests: a case is a set of settings, and the random arrays that go with them."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from support import oracle

from twomamba_jax import init_state

BATCH, VALUE_DIM, CACHED = 3, 3, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of one call, as the operation names them."""

    score: str = "squared"
    normalize: bool = True
    decay: bool = True
    segments: bool = False
    lengths: bool = False
    heads: tuple[int, int] = (2, 2)
    initial_state: bool = False
    head_dim: int = 8
    tokens: int = 63

    def __str__(self):
        flags = [name for name in ("normalize", "decay", "segments", "lengths", "initial_state") if getattr(self, name)]
        return "-".join([self.score, f"T{self.tokens}", f"K{self.head_dim}", f"H{self.heads[0]}", *flags])

    def arrays(self, dtype=np.float64) -> dict:
        """The inputs: q, k, v, log_decay, segment_ids, lengths, state (as the oracle takes it); None where unset."""
        rng = np.random.default_rng(list(str(self).encode()))
        (heads, kv_heads), tokens, size = self.heads, self.tokens, self.head_dim

        def normal(*shape):
            return rng.normal(size=shape).astype(dtype)

        q, k, v = (normal(BATCH, tokens, n, m) for n, m in ((heads, size), (kv_heads, size), (kv_heads, VALUE_DIM)))
        if self.score == "linear" and self.normalize:
            q, k = np.abs(q), np.abs(k)  # its denominators are sums of scores, which must not be negative
        return {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": -np.logaddexp(0, normal(BATCH, tokens, kv_heads)).astype(dtype) if self.decay else None,
            # Runs of about five tokens whose ids recur.
            "segment_ids": np.cumsum(rng.random((BATCH, tokens)) < 0.2, axis=1) % 3 if self.segments else None,
            "lengths": np.array([tokens, tokens // 2, 0]) if self.lengths else None,
            "state": self._state(normal, dtype) if self.initial_state else None,
        }

    def empty_state(self, dtype):
        """The library's empty state for this case, a key/value cache of capacity `tokens`."""
        capacity = self.tokens if self.score == "exp" else None
        return init_state(
            self.score, BATCH, self.heads[1], self.head_dim, VALUE_DIM, capacity=capacity, dtype=jnp.dtype(dtype)
        )

    def _state(self, normal, dtype):
        """The state that a few random tokens leave behind."""
        kv_heads = self.heads[1]
        if self.score == "exp":
            capacity = self.tokens + CACHED + 2
            length = np.array([CACHED, 3, 1])
            return {
                "keys": normal(BATCH, kv_heads, capacity, self.head_dim),
                "values": normal(BATCH, kv_heads, capacity, VALUE_DIM),
                "log_decay": -np.abs(normal(BATCH, kv_heads, capacity)) if self.decay else None,
                "start": np.array([2, 0, 1]),  # the last row's segment has no token yet
                "length": length,
            }
        keys = normal(BATCH, kv_heads, 4, self.head_dim)
        phi = oracle.symmetric_features(keys) if self.score == "squared" else np.abs(keys)
        values = normal(BATCH, kv_heads, 4, VALUE_DIM)
        return (np.einsum("bgtd,bgtv->bgdv", phi, values).astype(dtype), phi.sum(2).astype(dtype))


def pairwise(settings: dict[str, list], possible=lambda choice: True) -> list[dict]:
    """A small list of possible choices in which every pair of values of two settings occurs, chosen greedily."""
    names = list(settings)
    everything = [dict(zip(names, values)) for values in itertools.product(*settings.values())]
    everything = list(filter(possible, everything))

    def pairs(choice):
        return set(itertools.combinations(choice.items(), 2))

    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda choice: len(pairs(choice) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
