"""How a model is computed: none of it changes a parameter or, beyond rounding, a result."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels import residuals
from twomamba_jax.ops.dispatch import FORMS, IMPLEMENTATIONS
from twomamba_jax.ops.elementwise import Elementwise
from twomamba_jax.ops.integers import Integer, checked_integer

# What is dear to compute and linear in T: products without a batch dimension, which are the projections, and what the
# attention kernels need again; and what is small or cheap (`ops.kept`). Products with one are the scores and weighted
# values of every row and head; to keep these too, as JAX's `dots_saveable` does, is to keep what is quadratic in T.
DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
NAMES = residuals.NAME, residuals.SMALL


def keeping(*names: str):
    """The policy that keeps `DOTS` and what has one of these names."""
    return jax.checkpoint_policies.save_from_both_policies(DOTS, jax.checkpoint_policies.save_only_these_names(*names))


DEAR = keeping(*NAMES)

# From a block to one that computes again, in the backward pass, what it has not kept. Outside of a loop over layers
# `prevent_cse` has to keep XLA from using what was computed before.
REMATS = {
    "none": lambda block, prevent_cse: block,
    "states": functools.partial(nn.remat, policy=keeping(*NAMES, residuals.STATES)),
    "dots": functools.partial(nn.remat, policy=DEAR),
    "full": nn.remat,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Dtypes, memory and kernels.

    Attributes:
      dtype: of activations and matrix products. Norms, decays, states and logits are float32 or wider all the same.
      param_dtype: of the parameters.
      remat: what of each block is computed again in the backward pass instead of being kept: "none", "dots" (all but
        the results of projections and attention kernels, and what is small or cheap to keep), "states" (the same, but
        for the states between chunks of the linear-time kernels: 336 bytes a token and head of 64 of squared scores),
        or "full" (all).
      scan_layers: whether layers run in a loop over their parameters, so that compilation time does not grow with
        depth, or one after the other, which is faster on a GPU. None: a loop, but for `decode` and most training
        steps (train/layer_loop.py) on GPUs. `decode` takes a copy of the layers' parameters for it.
      form: as in `decay_attention`.
      chunk_size: as in `decay_attention`.
      implementation: as in `decay_attention`.
      precision: as in `decay_attention`.
      elementwise_kernels: whether the backward passes of norms, convolutions and gated MLPs, and what the training loss
        takes of its logits, are kernels, too, where those of `implementation` support the model's sizes
        (docs/training.md); what they do is said once in the log.
      concurrent_kernels: whether kernels of a training step on NVIDIA GPUs (train/layer_loop.py) that do not need each
        other's results may run at the same time, which takes more memory.

    Raises:
      ValueError: a dtype that is not floating, an unknown remat, form, implementation or precision, a scan_layers,
        elementwise_kernels or concurrent_kernels that is no bool, a chunk size below 1 or without the chunked form.

    Examples:
      >>> model = LanguageModel(config, Execution(dtype=jnp.bfloat16, remat="dots"))
      >>> model.execution.param_dtype  # parameters stay as they are
      dtype('float32')
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Literal["none", "states", "dots", "full"] = "none"
    scan_layers: bool | None = None
    form: str | None = None
    chunk_size: Integer | None = None
    implementation: str | None = None
    precision: str | None = None
    elementwise_kernels: bool = True
    concurrent_kernels: bool = False

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            # One spelling, so that equal executions compile once: jnp.bfloat16 and "bfloat16" hash differently.
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
            if not jnp.issubdtype(getattr(self, name), jnp.floating):
                raise ValueError(f"{name}={getattr(self, name)} must be a floating point dtype")
        if self.remat not in REMATS:
            raise ValueError(f"remat={self.remat!r} is unknown: expected one of {', '.join(REMATS)}")
        if not isinstance(self.scan_layers, bool | None):
            raise ValueError(f"scan_layers={self.scan_layers!r} must be None, True or False")
        for name in ("elementwise_kernels", "concurrent_kernels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        for name, known in (
            ("form", FORMS),
            ("implementation", IMPLEMENTATIONS),
            ("precision", ("highest",)),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r} is unknown: expected None or one of {', '.join(known)}")
        object.__setattr__(self, "chunk_size", checked_integer("chunk_size", self.chunk_size, or_none=True))
        if self.chunk_size is not None and self.form in ("parallel", "recurrent"):
            raise ValueError(f"chunk_size={self.chunk_size} needs form='chunked' or None, got form={self.form!r}")

    def elementwise(self, channels: str) -> Elementwise:
        """The kernels between products, of arrays whose channels have this logical axis."""
        implementation = self.implementation if self.elementwise_kernels else "xla"
        return Elementwise(implementation, nn.logical_to_mesh_axes(("batch", "length", channels)))
