"""The device mesh, and which axis of it each logical axis of the model is spread over.

The step is always `jax.jit` with shardings over a mesh of four axes; one device is a mesh of one.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

RULES = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("conv", None),
)


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


def make_mesh(sizes: Mapping[str, int], batch_size: int) -> Mesh:
    """The mesh over all devices. Raises UserError where the sizes, or the batch, do not divide."""
    shape = mesh_shape(sizes, jax.device_count())
    rows = shape[0] * shape[1]
    if batch_size % rows:
        raise UserError(f"batch_size={batch_size} must be a multiple of mesh.data x mesh.fsdp = {rows}")
    # Auto, since linen's logical constraints raise under the Explicit axes that make_mesh gives by default.
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def token_shards(mesh: Mesh) -> tuple[int, int]:
    """How many shares the rows of a batch are cut into, and how many the tokens of a row."""
    return mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array [B, T] of a batch."""
    return NamedSharding(mesh, P(("data", "fsdp"), "sequence"))


def tree_shardings(boxed: object, mesh: Mesh) -> object:
    """The sharding of every leaf of an abstract tree whose parameters are boxed with their logical axis names.

    A leaf without a box (a step count) is replicated.
    """
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
