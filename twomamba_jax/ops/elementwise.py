"""Kernels for what stands between matrix products: whether a call takes them, and each device's part of it.

They are the backward passes of norms, convolutions and gated MLPs, and what a loss takes of its logits. XLA computes
the same; it makes several passes over memory of what a kernel does in one.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from twomamba_jax.ops import dispatch
from twomamba_jax.ops.dispatch import Implementation
from twomamba_jax.ops.sharding import devices_of

_log = logging.getLogger("twomamba_jax")


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """The kernels that a model's layers and its loss may take.

    Attributes:
      implementation: of the model: kernels are taken for None and for a language that has them, where they support the
        arrays, and XLA computes the rest: but for rounding the values are the same.
      partition: the mesh axes of (batch, length, channels), as in `decay_attention`; None, or no mesh: one device.
    """

    implementation: Implementation | None = "xla"
    partition: PartitionSpec | None = None

    def axes(self) -> tuple[Any, Any, Any]:
        """The mesh axes of the batch, of the tokens and of the heads, channels or vocabulary; None without a mesh."""
        if self.partition is None or jax.sharding.get_abstract_mesh().empty:
            return None, None, None
        batch, length, heads, *_ = (*self.partition, None, None, None)
        return batch, length, heads

    def kernels(
        self,
        what: str,
        *arrays: tuple[jax.Array | jax.ShapeDtypeStruct, PartitionSpec],
        whole: Sequence[tuple[str, Any]] = (),
    ) -> Any | None:
        """The module of the kernels for `what`, or None where XLA computes it; that is logged once.

        `arrays`: those that `unsupported` of the module takes, each with the mesh axes of its dimensions. `whole`: what
        each device must have all of, by name, with its mesh axes.
        """
        if self.implementation == "xla":
            return None
        language = self.implementation or dispatch.kernels_of_device()

        def ask(kernels) -> str | None:
            module = kernels.elementwise.get(what)
            if module is None:
                return "there is none in this language"
            if cut := [name for name, axes in whole if devices_of(axes) > 1]:
                return f"it is for a device that has all {' and '.join(cut)}"
            return module.unsupported(*(_local(x, spec) for x, spec in arrays))

        reason = dispatch.refusal(language, ask)
        _log_choice(what, language, reason)
        return None if reason else dispatch.load(language).elementwise[what]

    def shard(self, call: Callable, in_specs, out_specs) -> Callable:
        """`call` of arrays, on each device with its part of them."""
        if self.axes() == (None, None, None):
            return call
        return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local(x: jax.Array | jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """A device's part of an array."""
    axes = (*spec, *[None] * (len(x.shape) - len(spec)))
    return jax.ShapeDtypeStruct(tuple(n // devices_of(a) for n, a in zip(x.shape, axes)), x.dtype)


@functools.cache
def _log_choice(what: str, language: Implementation, reason: str | None) -> None:
    """Says once what computes a part."""
    chosen, why = (language, "") if reason is None else ("xla", f" ({language}: {reason})")
    _log.info("elementwise kernel of the %s: implementation=%s%s", what, chosen, why)
