"""From which length on `form=None` takes the chunked kernels."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunked import table
from pallas_kernels.chunked.table import Crossover, crossover
from twomamba_jax import decay_attention
from twomamba_jax.ops import kernels

ROWS = (
    Crossover("a GPU", "squared", "forward", sequences=8, tokens=5000),
    Crossover("a GPU", "squared", "forward+backward", sequences=8, tokens=3000),
    Crossover("a GPU", "squared", "forward+backward", sequences=128, tokens=2000),
)


@pytest.mark.parametrize(
    ("device", "direction", "sequences", "tokens"),
    [
        ("a GPU", "forward", 1, 5000),
        ("a GPU", "forward+backward", 31, 3000),
        ("a GPU", "forward+backward", 33, 2000),
        ("a GPU", "forward+backward", 4096, 2000),
        ("another", "forward", 8, 6144),  # 1024 (K + V) + 4 * 2560 V flops, K = V
    ],
)
def test_the_nearest_entry_or_equal_numbers_of_products(monkeypatch, device, direction, sequences, tokens):
    monkeypatch.setattr(table, "TABLE", ROWS)
    assert crossover(device, "squared", direction, sequences) == tokens


def test_none_takes_what_the_table_says(monkeypatch):
    """B H = 128 here, and T one below, at and above the crossover of both directions together."""
    monkeypatch.setattr(table, "TABLE", ROWS)
    monkeypatch.setattr(kernels, "unsupported_device", lambda: None)
    monkeypatch.setattr(kernels, "device_kind", lambda: "a GPU")
    taken = []
    monkeypatch.setattr(kernels, "parallel", lambda op, q, *rest: taken.append("parallel") or q)
    monkeypatch.setattr(kernels, "chunked", lambda op, q, *rest, **options: taken.append("chunked") or (q, None))
    for tokens in (1999, 2000, 2001):
        q = jax.ShapeDtypeStruct((4, tokens, 32, 64), jnp.bfloat16)
        jax.eval_shape(lambda q: decay_attention(q, q, q, None, score="squared"), q)
    assert taken == ["parallel", "parallel", "chunked"]
