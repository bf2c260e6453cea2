"""The random key of a seed."""

import jax


def random_key(seed: int) -> jax.Array:
    """`jax.random.key(seed)` of a seed below 2^32; of larger and negative ones all 64 bits count, not the lowest 32."""
    key, rest = jax.random.key(seed % 2**32), seed // 2**32 % 2**32
    return jax.random.fold_in(key, rest) if rest else key
