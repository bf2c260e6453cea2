"""The box of a parameter that carries its logical axis names, in Flax's linen and in NNX."""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax


@flax.struct.dataclass
class LogicalAxes(nn.LogicallyPartitioned):
    """`nn.LogicallyPartitioned` whose names NNX takes as names, until a mesh and rules make shardings of them.

    NNX shards a variable when it is made, by the metadata of its box: without a mesh it refuses names, and without
    rules it takes them for a mesh's own.
    """

    def to_nnx_metadata(self) -> dict[str, Any]:
        """The metadata of the `nnx.Variable` that `nnx.bridge` makes of the box."""
        has_mesh = not jax.sharding.get_abstract_mesh().empty
        has_rules = bool(self.rules or nn.get_logical_axis_rules())
        metadata = dict(vars(self))
        metadata["out_sharding"] = metadata.pop("names")
        metadata["sharding_rules"] = metadata.pop("rules")
        return metadata | {"eager_sharding": has_mesh and has_rules}


def with_logical_axes(init: Callable[..., jax.Array], names: tuple[str | None, ...]) -> Callable[..., LogicalAxes]:
    """`init`, with what it returns in a box that carries `names`, one for each dimension."""

    def boxed(*args: Any) -> LogicalAxes:
        return LogicalAxes(init(*args), names)

    return boxed
