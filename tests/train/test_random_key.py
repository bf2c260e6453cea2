"""Seeds of 64 bits, of which JAX's own key has 32."""

import jax
import pytest

from train.errors import UserError
from train.random_key import random_key


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_a_seed_of_32_bits_is_as_in_jax(seed):
    assert (jax.random.key_data(random_key(seed)) == jax.random.key_data(jax.random.key(seed))).all()


def test_all_bits_of_a_seed_count():
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63 - 1, -1]
    assert len({tuple(jax.random.key_data(random_key(seed)).tolist()) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**64)])
def test_a_seed_of_more_bits_is_refused(seed):
    with pytest.raises(UserError, match=f"seed={seed} must be at least -9223372036854775807 and at most"):
        random_key(seed)
