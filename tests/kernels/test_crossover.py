"""From which length on `form=None` takes the chunked kernels."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunked import crossovers
from pallas_kernels.chunked.crossovers import Crossover, crossover
from twomamba_jax import decay_attention
from twomamba_jax.ops import dispatch, kernels, mosaic_gpu

ROWS = (
    Crossover("a GPU", "squared", 64, "forward", sequences=8, tokens=5000),
    Crossover("a GPU", "squared", 64, "forward+backward", sequences=8, tokens=3000),
    Crossover("a GPU", "squared", 64, "forward+backward", sequences=128, tokens=2000),
)


@pytest.mark.parametrize(
    ("device", "score", "head_dim", "direction", "sequences", "tokens"),
    [
        ("a GPU", "squared", 64, "forward", 1, 5000),
        ("a GPU", "squared", 64, "forward+backward", 31, 3000),
        ("a GPU", "squared", 64, "forward+backward", 33, 2000),
        ("a GPU", "squared", 64, "forward+backward", 4096, 2000),
        ("another", "squared", 64, "forward+backward", 8, 3000),
        ("a GPU", "squared", 32, "forward", 8, None),
        ("a GPU", "linear", 64, "forward", 8, None),
    ],
)
def test_the_nearest_entry(monkeypatch, device, score, head_dim, direction, sequences, tokens):
    monkeypatch.setattr(crossovers, "TABLE", ROWS)
    assert crossover(device, score, head_dim, direction, sequences) == tokens


@pytest.mark.parametrize(
    ("score", "head_dim", "tokens"),
    [
        ("squared", 64, 6144),  # 1024 (K + V) + 4 * 2560 V flops, K = V
        ("linear", 64, 640),  # 512 (K + V) + 4 K V
        ("linear", 128, 768),
    ],
)
def test_without_an_entry_both_do_equal_numbers_of_products(monkeypatch, score, head_dim, tokens):
    monkeypatch.setattr(crossovers, "TABLE", ())
    monkeypatch.setattr(mosaic_gpu, "device_kind", lambda: "a GPU")
    assert mosaic_gpu.crossover(score, head_dim, 8) == tokens


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
@pytest.mark.parametrize(("score", "crossover"), [("squared", 2000), ("linear", 640)])
def test_no_form_is_what_the_table_says(monkeypatch, score, implementation, crossover):
    """B H = 128 here, and T one below, at and above the crossover of both directions together."""
    lengths = crossover - 1, crossover, crossover + 1
    assert forms(monkeypatch, score, implementation, lengths) == ["parallel", "parallel", "chunked"]


def forms(monkeypatch, score, implementation, lengths) -> list[str]:
    """Those that the kernels are asked for."""
    monkeypatch.setattr(crossovers, "TABLE", ROWS)
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "device_kind", lambda: "a GPU")
    taken = []

    def attend(self, op, form, chunk_size, return_final_state, q, *rest):
        taken.append(form)
        return q, None

    monkeypatch.setattr(kernels.Kernels, "attend", attend)
    for tokens in lengths:
        q = jax.ShapeDtypeStruct((4, tokens, 32, 64), jnp.bfloat16)
        jax.eval_shape(lambda q: decay_attention(q, q, q, None, score=score, implementation=implementation), q)
    return taken
