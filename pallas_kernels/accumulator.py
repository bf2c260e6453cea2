"""Accumulators of matrix products in registers, and their stand-in under the Pallas interpreter.

On the GPU an accumulator is a `wgmma` accumulator: products are added to it asynchronously, its left operand may lie in
registers, and it can be scaled in place. The interpreter knows neither register operands nor assignment to
accumulators; there an accumulator is a float32 buffer in shared memory, and left operands go through another one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)  # one value per row of a tile
COLUMN = TILE.reduce(0)  # one value per column


def rows(vector, shape):
    """A value per row, for every element of a tile."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def columns(vector, shape):
    """A value per column, for every element of a tile."""
    return lax.broadcast_in_dim(vector, shape, (1,))


def store(ref, value) -> None:
    """ref[...] = value, with bank conflicts if there must be some. JAX before 0.12 allows them of itself."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def anew(x):
    """x, as a value of its own: what follows from it is computed where it is used and not kept in registers.

    For what takes a few instructions to compute and a register, during a loop that has none left, to keep.
    """
    return lax.optimization_barrier(x)


def positions(row, size: int):
    """(a, b), [64, size] each, with a - b = row_i - j, of a number per row and the numbers of the columns.

    b repeats every eight columns: the numbers of all would be kept in registers during every loop.
    """
    eight = columns(plgpu.broadcasted_iota(jnp.int32, (8,), 0, layout=COLUMN), (64, 8))
    starts = range(0, size, 8)
    of_rows = jnp.concatenate([rows(row - start, (64, 8)) for start in starts], axis=1)
    return of_rows, jnp.concatenate([eight for _ in starts], axis=1)


def operand(shape, depth: int = 64):
    """A shared memory buffer of bfloat16 that holds operands of matrix products in its last two dimensions.

    depth: what the summed dimension of a product must be a multiple of, 64 or 32; equal for both operands.
    """
    transforms = (plgpu.TilingTransform((8, depth)), plgpu.SwizzleTransform(2 * depth))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Where accumulators and left operands live: registers, or under the interpreter the buffers of one warpgroup.

    Attributes:
      accumulators: buffers [64, N] float32, taken in order of use, or None on the GPU.
      left: a buffer [64, N] for left operands, or None on the GPU.
    """

    accumulators: tuple[Any, ...] | None = None
    left: Any = None

    @staticmethod
    def types(interpret: bool, warpgroups: int, accumulators: tuple[tuple[int, int], ...], left: int, depth: int = 64):
        """The scratch of a kernel, for `Scratch.of`: nothing unless interpreting."""
        if not interpret:
            return ()
        buffers = [plgpu.SMEM((warpgroups, *shape), jnp.float32) for shape in accumulators]
        return (tuple(buffers), operand((warpgroups, 64, left), depth))

    @staticmethod
    def of(buffers, warpgroup) -> "Scratch":
        """The part of one warpgroup."""
        if not buffers:
            return Scratch()
        accumulators, left = buffers
        return Scratch(tuple(buffer.at[warpgroup] for buffer in accumulators), left.at[warpgroup])

    def accumulate(self, body: Callable, *shapes: tuple[int, int]):
        """`body(*accumulators)` with zeroed accumulators of these shapes."""
        if self.accumulators is None:
            return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        buffers = self.accumulators[: len(shapes)]
        for buffer, shape in zip(buffers, shapes, strict=True):
            buffer[...] = jnp.zeros(shape, jnp.float32)
        return body(*buffers)

    def multiply(self, body: Callable, *terms):
        """`body(products)` with start + a @ b on its way for every term (a, b, start); start None is 0.

        Products that were in flight before are awaited between the first term and the second: the registers of their
        operands may serve as the second's accumulator.
        """
        accumulators, starts = [], []

        def issue(acc):
            a, b, start = terms[len(accumulators)]
            if start is not None and self.accumulators is None:
                acc[...], start = start, None
            plgpu.wgmma(acc, self._stored(a), b)
            accumulators.append(acc)
            starts.append(start)
            if len(accumulators) < len(terms):
                return issue_next()
            return body(Products(self, accumulators, starts))

        def issue_next():
            if accumulators:
                plgpu.wgmma_wait(len(accumulators))
            a, b, _ = terms[len(accumulators)]
            return pl.run_scoped(issue, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

        return issue_next()

    def add(self, acc, a, b) -> None:
        """acc += a @ b, to an accumulator of `accumulate`; not awaited."""
        if self.accumulators is None:
            plgpu.wgmma(acc, a, b)
        else:
            acc[...] += self.product(a, b)

    def product(self, a, b):
        """a @ b, awaited."""
        return self.multiply(lambda products: products.take(0), (a, b, None))

    def wait(self, in_flight: int) -> None:
        """Waits until no more than the last `in_flight` products are in flight."""
        if self.accumulators is None:
            plgpu.wgmma_wait(in_flight)

    def _stored(self, a):
        if self.accumulators is None or not isinstance(a, jax.Array):
            return a
        left = self.left.at[:, pl.ds(0, a.shape[1])]
        left[...] = a
        plgpu.commit_smem()
        return left


class Products:
    """Matrix products in flight, in the order in which they were issued."""

    def __init__(self, scratch: Scratch, accumulators, starts):
        """Products of `scratch` into these accumulators; what the interpreter has to add to them."""
        self._scratch, self._accumulators, self._starts = scratch, accumulators, starts
        self._issued = len(accumulators)

    def take(self, i: int):
        """The i-th product, after it and all that were issued before it are done.

        The barrier keeps the compiler from moving arithmetic on the value above the wait.
        """
        acc, start = self._accumulators[i], self._starts[i]
        if self._scratch.accumulators is not None:
            return acc[...] if start is None else acc[...] + start
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=self._issued - 1 - i))

    def add(self, acc, a, b) -> None:
        """`Scratch.add`, in turn with these products."""
        self._issued += 1
        self._scratch.add(acc, a, b)


def read(acc):
    """The accumulator's value, after every product in flight.

    The barrier keeps the compiler from moving arithmetic on the value above the wait.
    """
    return lax.optimization_barrier(acc[...])


def load_vector(ref, layout=ROW):
    """A vector: of one value per row of a tile, or with COLUMN per column."""
    return plgpu.load(ref, layout=layout, optimized=False)


def load_rows(ref, start: int, size: int):
    """`size` entries of a vector from device memory, as tuples of 64 in layout ROW."""
    return tuple(load_vector(ref.at[pl.ds(start + at, 64)]) for at in range(0, size, 64))


def store_rows(ref, vectors) -> None:
    """Stores such vectors in shared memory."""
    for i, vector in enumerate(vectors):
        ref[pl.ds(i * 64, 64)] = vector
