"""The random key of a seed."""

import jax

from train.errors import UserError
from train.keys import LARGEST_SEED


def random_key(seed: int) -> jax.Array:
    """`jax.random.key(seed)` of a seed below 2^32; of larger and negative ones all 64 bits count, not the lowest 32.

    Raises UserError for a seed that has more.
    """
    if not -LARGEST_SEED <= seed <= LARGEST_SEED:
        raise UserError(f"seed={seed} must be at least {-LARGEST_SEED} and at most {LARGEST_SEED}")
    key, rest = jax.random.key(seed % 2**32), seed // 2**32 % 2**32
    return jax.random.fold_in(key, rest) if rest else key
