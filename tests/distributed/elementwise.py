"""The elementwise kernels on four devices against one: the error of each result, over its largest entry."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from support.exhaustive import EXHAUSTIVE

from pallas_kernels.interpreter import interpreted
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.joint_convolution import joint_convolution
from twomamba_jax.ops.norm import norm_with_residual
from twomamba_jax.ops.softmax_rows import softmax_rows
from twomamba_jax.ops.swiglu import gated_product

SEGMENT_IDS = jnp.asarray([[0, 0, 1, 1, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2, 2, 2]])


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def norm(elementwise, x, scale):
    return norm_with_residual(x, scale, 1e-5, 2, elementwise)


def convolution(elementwise, x, kernel, bias):
    return joint_convolution(x, kernel, bias, SEGMENT_IDS, elementwise)


def swiglu(elementwise, gate_up, kernel):
    return gated_product(gate_up, kernel, elementwise)


ROWS, TOKENS, CHANNELS = (PartitionSpec(*axes) for axes in (["a"], ["a", "b"], ["a", None, "b"]))
ONE_ROW = PartitionSpec(None, ("a", "b"))
CASES = [
    (norm, (normal(0, 2, 4, 512), normal(1, 512, dtype=jnp.float32)), [ROWS, TOKENS]),
    *(
        (
            convolution,
            (normal(0, 2, 8, 3, 16, 64), *(normal(n, *[taps] * (n < 2), 3, 16, 64, dtype=jnp.float32) for n in (1, 2))),
            partitions,
        )
        for taps, partitions in ((2, [ROWS, CHANNELS, TOKENS, ONE_ROW]), (4, [TOKENS]))
    ),
    (swiglu, (normal(0, 2, 4, 2, 1024), normal(1, 1024, 8)), [TOKENS, CHANNELS]),
]


if not EXHAUSTIVE:  # what devices pass on to each other
    CASES = [CASES[2]]


def results(function, partition, arrays):
    """The gradients of the sum of the outputs, each times numbers of its own, and the outputs."""

    @jax.jit
    def run(*arrays):
        y, pull = jax.vjp(lambda *x: function(Elementwise("mosaic_gpu", partition), *x), *arrays)
        leaves, structure = jax.tree.flatten(y)
        return *pull(jax.tree.unflatten(structure, [normal(9 + n, *x.shape) for n, x in enumerate(leaves)])), *leaves

    return run(*arrays)


LOGITS = normal(0, 2, 2, 3, 516, dtype=jnp.float32)
TARGETS = jnp.arange(12).reshape(2, 2, 3)


def rows(partition):
    """Those of logits whose first dimension is of shares of the batch, and the second of shares of its tokens."""
    return jax.jit(lambda *arrays: softmax_rows(*arrays, Elementwise("mosaic_gpu", partition)))(LOGITS, TARGETS)


def error(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return float(np.abs(a - b).max() / np.abs(b).max())


def main():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    errors = {}
    with interpreted():
        for function, arrays, partitions in CASES:
            want = results(function, None, arrays)
            for partition in partitions:
                with jax.set_mesh(mesh):
                    got = results(function, partition, arrays)
                errors[f"{function.__name__} {arrays[1].shape}, {tuple(partition)}"] = list(map(error, got, want))
        want = rows(None) if EXHAUSTIVE else None
        for partition in (ROWS, TOKENS) if EXHAUSTIVE else ():
            with jax.set_mesh(mesh):
                got = rows(partition)
            errors[f"rows, {tuple(partition)}"] = list(map(error, got, want))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
