"""How Pallas Mosaic GPU kernels are launched: what they read, write and use by name, warpgroups by their roles."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.accumulator import Scratch


class Refs(NamedTuple):
    """What a kernel's body is given.

    inputs, outputs: as they were given to `launch`, of references in the place of arrays and of types. scratch: by the
    names of its types.
    """

    inputs: Any
    outputs: Any
    scratch: SimpleNamespace


def launch(body: Callable[[Refs], None], inputs: Any, outputs: Any, scratch: Mapping[str, Any], **options: Any) -> Any:
    """What a kernel writes: a pytree like `outputs`.

    Args:
      body: of the kernel.
      inputs: a pytree of arrays, such as a NamedTuple; None stands for what this call has not.
      outputs: a pytree of `jax.ShapeDtypeStruct`; None stands for what is not wanted.
      scratch: the types of scratch memory.
      options: of `plgpu.kernel`.
    """
    arrays, inputs_tree = jax.tree.flatten(inputs)
    types, outputs_tree = jax.tree.flatten(outputs)

    def named(*refs):
        given, written = inputs_tree.unflatten(refs[: len(arrays)]), refs[len(arrays) : len(arrays) + len(types)]
        rest = SimpleNamespace(**dict(zip(scratch, refs[len(arrays) + len(types) :], strict=True)))
        body(Refs(given, outputs_tree.unflatten(written), rest))

    kernel = plgpu.kernel(named, out_type=tuple(types), scratch_types=list(scratch.values()), **options)
    return outputs_tree.unflatten(kernel(*arrays))


class Roles(NamedTuple):
    """The warpgroups of a program: `consumers` that multiply, and one that loads. Registers are those of a thread."""

    consumers: int
    consumer_registers: int
    producer_registers: int


def launch_persistent(
    load: Callable,
    compute: Callable,
    inputs: Any,
    outputs: Any,
    scratch: Mapping[str, Any],
    *,
    roles: Roles,
    programs: int,
    accumulators: Any,
    name: str,
) -> Any:
    """`launch` of a fixed number of programs, each with a warpgroup that loads for those that multiply.

    Args:
      load: `load(refs, program)`, of the last warpgroup.
      compute: `compute(refs, program, warpgroup, accumulators)` of each of the others, with its `Scratch`.
      inputs, outputs, scratch: as in `launch`.
      roles: of the warpgroups.
      programs: how many share the work.
      accumulators: the `Scratch.types` of the kernel.
      name: of the kernel in profiles.
    """

    def body(refs: Refs):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

        @pl.when(warpgroup == roles.consumers)
        def _load():
            plgpu.set_max_registers(roles.producer_registers, action="decrease")
            load(refs, program)

        @pl.when(warpgroup < roles.consumers)
        def _compute():
            plgpu.set_max_registers(roles.consumer_registers, action="increase")
            compute(refs, program, warpgroup, Scratch.of(refs.scratch.accumulators, warpgroup))

        # A warpgroup that leaves while another one multiplies can fault.
        plgpu.barrier_arrive(refs.scratch.done)
        plgpu.barrier_wait(refs.scratch.done)

    done = plgpu.Barrier(num_arrivals=roles.consumers + 1)
    return launch(
        body,
        inputs,
        outputs,
        {**scratch, "done": done, "accumulators": accumulators},
        grid=(programs,),
        grid_names=("program",),
        num_threads=roles.consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
