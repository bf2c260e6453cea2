"""The device mesh, and which axis of it each logical axis of the model is sharded over.

The step is always `jax.jit` with shardings over a mesh of four axes; one device is a mesh of one.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from train.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

RULES = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("qk_groups", None),
    ("vocab", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("conv", None),
)

# A row that is sampled alone cannot be cut as batches are: every device computes its part of the model for all of it.
ONE_ROW_RULES = tuple((name, None if name in ("batch", "length") else axes) for name, axes in RULES)


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """The sizes in the order of MESH_AXES, with -1 (at most one) replaced by the devices that are left.

    Raises UserError where they do not multiply to `num_devices`.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    described = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"{described}: each must be at least 1, and one of them may be -1")
    if num_devices % given or (-1 not in shape and given != num_devices):
        raise UserError(f"{described} do not multiply to the number of devices, {num_devices}")
    return tuple(num_devices // given if size == -1 else size for size in shape)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """The mesh over all devices, those of other processes included. Raises UserError where the sizes do not fit."""
    shape = mesh_shape(sizes, jax.device_count())
    # Auto, since linen's logical constraints raise under the Explicit axes that make_mesh gives by default.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_dimensions(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError naming the first dimension of the model or the batch that RULES cannot cut into equal parts."""
    rules, model = dict(RULES), config.model
    heads = "num_heads" if model.num_kv_heads is None else "num_kv_heads"
    for key, size, name in (
        ("batch_size", config.batch_size, "batch"),
        ("length", config.length, "length"),
        ("model.d_model", model.d_model, "embed"),
        ("model.mlp_dim", model.mlp_dim, "mlp"),
        ("model.num_heads", model.num_heads, "heads"),
        (f"model.{heads}", model[heads], "kv_heads"),
        ("model.vocab_size", model.vocab_size, "vocab"),
    ):
        axes = (rules[name],) if isinstance(rules[name], str) else rules[name] or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            product = " x ".join(f"mesh.{axis}" for axis in axes)
            raise UserError(f"{key}={size} must be a multiple of {product} = {parts}: change one of them")


def token_shards(mesh: Mesh) -> tuple[int, int]:
    """How many shares the rows of a batch are cut into, and how many the tokens of a row."""
    return mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array [B, T] of a batch."""
    return NamedSharding(mesh, P(("data", "fsdp"), "sequence"))


def rows_of_process(sharding: NamedSharding, batch_size: int, process: int) -> tuple[int, int]:
    """Which part of the rows of a batch the devices of `process` hold, and into how many equal parts it is cut.

    Processes whose devices split nothing but heads or tokens hold the same rows: then there are fewer parts than
    processes. Raises UserError where the parts are not equal, or overlap.
    """
    held: dict[int, set[int]] = {}
    for device, (rows, _) in sharding.devices_indices_map((batch_size, sharding.mesh.shape["sequence"])).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if [row for part in parts for row in part] != list(range(batch_size)) or len(set(map(len, parts))) != 1:
        described = ", ".join(f"mesh.{axis}={size}" for axis, size in sharding.mesh.shape.items())
        raise UserError(
            f"{described} gives the {len(held)} processes rows that overlap or are not equally many: make mesh.tensor "
            "x mesh.sequence a multiple or a divisor of the devices of a process"
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)


def tree_shardings(boxed: object, mesh: Mesh) -> object:
    """The sharding of every leaf of an abstract tree whose parameters are boxed with their logical axis names.

    A leaf without a box (a step count) is replicated.
    """
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
