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
from jaxtyping import Bool, Float, Float32, Int

Array = jax.Array

Queries = Float[Array, "B T H K"]
Keys = Float[Array, "B T G K"]
Values = Float[Array, "B T G V"]
Outputs = Float[Array, "B T H V"]
LogDecay = Float32[Array, "B T G"]
SegmentIds = Int[Array, "B T"]
Lengths = Int[Array, "B"]
Tokens = Int[Array, "B T"]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Float32",
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
