"""The elementwise kernels as programs that can be lowered and compiled without a GPU."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.elementwise.convolution import convolution_backward
from pallas_kernels.elementwise.norm import norm_backward
from pallas_kernels.elementwise.softmax import softmax_rows
from pallas_kernels.elementwise.swiglu import swiglu_backward
from pallas_kernels.quadratic.programs import Program

TOKENS = 16384


def programs() -> Iterator[Program]:
    """Every kernel at the widths of the configurations."""
    for width in (512, 1024, 1536, 2048):
        x = _shape(TOKENS, width)
        for products in (1, 2, 4):
            function = functools.partial(_norm_backward, products)
            yield Program(f"norm_backward-{products}-{width}", function, (x, _shape(width, dtype=jnp.float32), x, x))
    for width, channels in itertools.product((2, 4), (1024, 1536)):
        x, dy = _shape(8, TOKENS // 8, 3, channels), _shape(8, TOKENS // 8, channels)
        kernel, continues = _shape(width, 3, channels), _shape(*x.shape[:2], dtype=jnp.float32)
        arguments = x, kernel, continues, dy, dy, dy
        yield Program(f"convolution_backward-{width}-{channels}", convolution_backward, arguments)
    for hidden in (1024, 2048, 3072):
        yield Program(f"swiglu_backward-{hidden}", swiglu_backward, (_shape(TOKENS, 2, hidden), _shape(TOKENS, hidden)))
    for vocabulary in (512, 32000):
        arguments = _shape(2048, vocabulary, dtype=jnp.float32), _shape(2048, dtype=jnp.int32)
        yield Program(f"softmax_rows-{vocabulary}", softmax_rows, arguments)


def _norm_backward(products, x, scale, dy, dresidual):
    return norm_backward(x, scale, (dy,) * products, dresidual, 1e-5)


def _shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)
