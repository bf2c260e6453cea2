"""What a device of a mesh needs for one training step, read off the compiled program: nothing is allocated or run.

The devices are simulated on the CPU, so a mesh of any size can be asked about on any machine. The figures are those of
XLA's CPU compiler: arguments and outputs (the state and the batch) are the same on every device, temporaries are not: a
CPU sums bfloat16 products in float32 copies, and a GPU's kernels hold less than `form="chunked"` does.

    python benchmarks/mesh_memory.py --config configs/2mamba.py:large --override mesh.data=1 mesh.fsdp=8
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import clone  # noqa: F401
import flax.linen as nn
import jax
from jax.stages import Compiled
from ml_collections import ConfigDict

from train.configuration import apply_overrides, load_config, validate
from train.data.rows import abstract_batch
from train.errors import UserError
from train.loop import build
from train.sharding import RULES, make_mesh

GIB = 2**30


def compile_step(config: ConfigDict) -> tuple[int, Compiled]:
    """The number of parameters, and the train step compiled for the mesh of `config`. Raises UserError."""
    validate(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        run = build(config, Path(), mesh)
        step = run.train_step.lower(run.abstract, abstract_batch(config.batch_size, config.length)).compile()
    return sum(leaf.size for leaf in jax.tree.leaves(run.abstract.params)), step


def main(arguments: Sequence[str]) -> int:
    """Prints the figures; the exit status is 2 for a configuration that cannot be trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/2mamba.py:large", metavar="PATH[:SIZE]")
    parser.add_argument("--devices", type=int, default=8, help="simulated")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE")
    options = parser.parse_args(arguments)
    for setting in options.override:
        if "=" not in setting:
            parser.error(f"--override {setting}: expected KEY=VALUE")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    try:
        config = load_config(options.config)
        apply_overrides(config, [tuple(setting.split("=", 1)) for setting in options.override])
        count, compiled = compile_step(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    memory = compiled.memory_analysis()
    mesh = ", ".join(f"{axis} {size}" for axis, size in config.mesh.items())
    rows = f"{config.batch_size} x {config.length} tokens, {config.execution.dtype}"
    print(f"{options.config}, {count:,} parameters, {options.devices} devices ({mesh}), {rows}; a device, in GiB:")
    for name, size in (
        ("arguments: state and batch", memory.argument_size_in_bytes),
        ("outputs", memory.output_size_in_bytes),
        ("of these in the arguments' place", memory.alias_size_in_bytes),
        ("temporaries", memory.temp_size_in_bytes),
    ):
        print(f"  {name:<34}{size / GIB:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
