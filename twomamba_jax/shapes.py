"""The letters that name array dimensions everywhere in this library, and the array types annotated with them.

| letter | meaning |
|---|---|
| B | batch |
| T | tokens |
| H | query heads |
| G | key/value heads; H is a multiple of G, and query head h reads key/value head h // (H // G) |
| K | head dimension of queries and keys |
| V | head dimension of values |
| D | features of a key in the state: K for the linear score, K (K + 1) / 2 for the squared one |
| S | capacity of a key/value cache, in tokens |
| W | width of the causal convolution |
| E | model width (`embed`) |

Inside `ops/` arrays are heads-first, `[B, G, R, T, K]` and `[B, G, T, K]`, with R = H // G query heads per key/value
head; N counts chunks and C is the chunk size.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

Array = jax.Array
AnyArray = jax.Array | np.ndarray  # what callers hand over, and a restored checkpoint holds

Queries = Float[AnyArray, "B T H K"]
Keys = Float[AnyArray, "B T G K"]
Values = Float[AnyArray, "B T G V"]
Outputs = Float[Array, "B T H V"]
LogDecay = Float32[AnyArray, "B T G"] | Float64[AnyArray, "B T G"]
SegmentIds = Int[AnyArray, "B T"]
Lengths = Int[AnyArray, "B"]
Tokens = Int[AnyArray, "B T"]

__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "Float",
    "Float32",
    "Float64",
    "Int",
    "Keys",
    "Lengths",
    "LogDecay",
    "Outputs",
    "Queries",
    "SegmentIds",
    "Tokens",
    "Values",
]
