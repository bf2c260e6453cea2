"""The quadratic kernels in Triton against the float64 oracle: interpreted without a GPU, compiled with one.

The bounds are those of `kernel_cases`.
"""

import support.triton  # noqa: F401, I001: before triton is imported

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import pairwise
from support.exhaustive import EXHAUSTIVE
from support.kernel_cases import Case, assert_close

SETTINGS = {
    "score": ["linear", "squared", "exp"],
    "normalize": [True, False],
    "decay": [True, False],
    "segments": [False, True],
    "heads": [(2, 1), (2, 2)],
}
if EXHAUSTIVE:
    SETTINGS |= {"head_dim": [64, 128], "tokens": [130, 1, 63, 400]}
    CASES = [Case(implementation="triton", **settings) for settings in pairwise(SETTINGS)]
else:
    CASES = [
        Case(tokens=300, segments=True, heads=(2, 1), implementation="triton"),
        Case(tokens=300, score="exp", heads=(1, 1), implementation="triton"),
        Case(tokens=130, score="linear", normalize=False, decay=False, heads=(1, 1), implementation="triton"),
        Case(tokens=1, score="exp", normalize=False, segments=True, head_dim=128, implementation="triton"),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_oracle(case):
    call = case.call()
    got = call.run()
    for name, x in got.items():
        like = call.q if name == "y" else getattr(call, name)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert_close(call, got)
