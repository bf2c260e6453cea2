"""How a model is computed: none of it changes a parameter or, beyond rounding, a result."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from twomamba_jax.ops.checks import FORMS
from twomamba_jax.ops.kernels import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Execution:
    """Dtypes, memory and kernels.

    Attributes:
      dtype: of activations and matrix products. Norms, decays, states and logits are float32 or wider all the same.
      param_dtype: of the parameters.
      remat: recompute each block's activations in the backward pass instead of keeping them.
      form: as in `decay_attention`.
      chunk_size: as in `decay_attention`.
      implementation: as in `decay_attention`.
      precision: as in `decay_attention`.

    Raises:
      ValueError: a dtype that is not floating, an unknown form, implementation or precision, a chunk size below 1 or
        without the chunked form.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    form: str | None = None
    chunk_size: int | None = None
    implementation: str | None = None
    precision: str | None = None

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            # One spelling, so that equal executions compile once: jnp.bfloat16 and "bfloat16" hash differently.
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
            if not jnp.issubdtype(getattr(self, name), jnp.floating):
                raise ValueError(f"{name}={getattr(self, name)} must be a floating point dtype")
        for name, known in (
            ("form", FORMS),
            ("implementation", IMPLEMENTATIONS),
            ("precision", ("highest",)),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r} is unknown: expected None or one of {', '.join(known)}")
        if self.chunk_size is not None and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise ValueError(f"chunk_size={self.chunk_size!r} must be an integer of at least 1, or None")
        if self.chunk_size is not None and self.form in ("parallel", "recurrent"):
            raise ValueError(f"chunk_size={self.chunk_size} needs form='chunked' or None, got form={self.form!r}")
