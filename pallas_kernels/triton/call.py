"""The one way in which Triton kernels are called: compiled through jax-triton, or interpreted; and under `jax.vmap`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.triton import interpreter
from pallas_kernels.triton.device import capability


def call(
    kernel,
    *operands: jax.Array | None,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    name: str,
    aliases: tuple[int, ...] = (),
    **constexprs,
) -> tuple[jax.Array, ...]:
    """The outputs of a kernel, in the order of the parameters that no operand and no constexpr fills.

    What the operands named by `aliases` have become follows. A buffer that is donated, or carried by a loop, is changed
    where it lies; XLA copies any other first.

    Args:
      kernel: a `triton.jit` function. Its parameters: pointers to the operands, pointers to the outputs, constexprs.
      operands: arrays, C-contiguous; None is what the kernel sees as None.
      out_type: shapes and dtypes of the outputs. What the kernel does not write holds old memory.
      grid: programs along each of up to three axes; the second and third have at most 65,535.
      num_warps: of a program.
      num_stages: of its loops' pipelines.
      name: of the kernel in profiles.
      aliases: positions of the operands that the kernel writes to.
      constexprs: sizes and flags, compiled in.
    """
    if interpreter.interpreting():
        outputs = interpreter.call(kernel, operands, out_type, grid, aliases, constexprs)
    else:
        import jax_triton  # where it is installed

        refs = {i: jax.new_ref(operands[i]) for i in aliases}
        outputs = jax_triton.triton_call(
            *(refs.get(i, operand) for i, operand in enumerate(operands)),
            kernel=kernel,
            out_type=out_type,
            grid=grid,
            name=name,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=capability(),
            # XLA assembles the PTX: with its own assembler, which may be older than Triton's.
            backend_options={"ptx_version": 87 if capability() < 100 else 90},
            **constexprs,
        )
        outputs = (*outputs, *map(jax.freeze, refs.values()))
    # Inside `jax.shard_map` the outputs vary over the mesh axes over which any operand does.
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in operands if x is not None))
    return tuple(_varying(x, axes) for x in outputs)


def _varying(x, axes: frozenset):
    missing = tuple(axes - jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def batched(function: Callable) -> Callable:
    """A function of pytrees of arrays that all start with a batch axis, and so do its results; `jax.vmap` adds to it.

    The function must ask its arrays for the size of the batch.
    """
    mappable = jax.custom_batching.custom_vmap(function)

    @mappable.def_vmap
    def rule(size, has_axis, *arguments):
        def merge(x, mapped):
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = mappable(*jax.tree.map(merge, arguments, tuple(has_axis)))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return mappable


def cdiv(size: int, block: int) -> int:
    """Blocks that hold `size`."""
    return math.ceil(size / block)
