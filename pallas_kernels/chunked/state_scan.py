"""The scan of a state, kv and normaliser, whatever scans an array."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels.chunked.stages import States


def make_scan(scan: Callable, *, counts: np.ndarray | None = None, parts: int = 1) -> Callable:
    """`Stages.scan`.

    Args:
      scan: of one array, as in `scan.scan`.
      counts: how often the entries of kv count in an inner product, as `scan` takes them; None is once.
      parts: 2: the normalisers before each step are sums of two numbers in bfloat16, [B, G, N, 2, ...]; 1: float32.
    """
    of_normalizer = {"parts": 2} if parts == 2 else {"dtype": jnp.float32}

    def wide(normalizer):
        return normalizer.astype(jnp.float32).sum(3) if parts == 2 else normalizer

    def scan_states(added, weight, initial, reverse=False, other: States | None = None, with_normalizer=True):
        kv, key_sum = (None, None) if initial is None else initial
        own = {} if other is None else {"other": other.kv, "counts": None if counts is None else jnp.asarray(counts)}
        before, last, *products = scan(added[0], weight, kv, reverse=reverse, **own)
        normalizer, last_normalizer = scan(added[1], weight, key_sum, reverse=reverse, **of_normalizer)
        states, final = States(before, normalizer), (last, last_normalizer)
        if other is None:
            return states, final, None
        inner = products[0].sum(-1)
        if with_normalizer:
            inner = inner + (wide(normalizer) * wide(other.normalizer)).reshape(*inner.shape, -1).sum(-1)
        return states, final, inner

    return scan_states
