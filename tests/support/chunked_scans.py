"""What a scan of states must do, whichever kernel makes it: against float64, its parts, its products."""

import jax.numpy as jnp
import numpy as np
from support.chunked_cases import normal, wide

STARTS = (False, True), (True, False), (True, True)  # reverse, and whether it starts from a state


def _arrays(tiles):
    """What three chunks add to two states of so many tiles, and the weights."""
    return normal(0, 1, 2, 3, tiles, 64, 64, dtype=jnp.float32), abs(normal(1, 1, 2, 3, dtype=jnp.float32))


def check_states(scan, reverse, starts):
    added, weight = _arrays(2)
    initial = normal(2, 1, 2, 2, 64, 64, dtype=jnp.float32) if starts else None
    before, final = scan(added, weight, initial, reverse=reverse, dtype=jnp.float32)
    state = np.zeros((1, 2, 2, 64, 64)) if initial is None else wide(initial)
    for c in reversed(range(3)) if reverse else range(3):
        np.testing.assert_allclose(before[:, :, c], state, atol=1e-5)
        state = wide(weight)[:, :, c, None, None, None] * state + wide(added[:, :, c])
    np.testing.assert_allclose(final, state, atol=1e-5)


def check_parts(scan, reverse):
    """What bfloat16 rounds away of a state is in the second part."""
    added, weight = _arrays(1)
    before, _ = scan(added, weight, None, reverse=reverse, dtype=jnp.float32)
    parts, _ = scan(added, weight, None, reverse=reverse, parts=2)
    assert parts.shape == (1, 2, 3, 2, 1, 64, 64)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_array_equal(parts[:, :, :, 0], before.astype(jnp.bfloat16))
    np.testing.assert_allclose(wide(parts).sum(3), before, rtol=2**-16)


def check_products(scan, counted):
    """Each 16 rows count as often as they are told to."""
    (added, weight), other = _arrays(2), normal(2, 1, 2, 3, 2, 64, 64)
    counts = jnp.asarray([[1, 2, 2, 1], [2, 1, 3, 2]], jnp.float32) if counted else None
    before, final, inner = scan(added, weight, None, reverse=True, dtype=jnp.float32, other=other, counts=counts)
    want = wide(before) * wide(other)
    if counted:
        want = want * np.repeat(counts, 16, axis=1)[..., None]
    np.testing.assert_allclose(wide(inner).sum(-1), want.sum((-3, -2, -1)), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(final, scan(added, weight, None, reverse=True)[1])
