"""From which length on the chunked kernels are faster than the quadratic ones.

`benchmarks/attention.py` prints the rows of TABLE that it has measured.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Crossover:
    """A measured crossover.

    Attributes:
      device: what JAX calls the device.
      score: of the attention.
      head_dim: K = V.
      direction: `forward` or `forward+backward`.
      sequences: B H at which it was measured.
      tokens: T at which both take the same time; the quadratic kernels are faster below.
    """

    device: str
    score: str
    head_dim: int
    direction: str
    sequences: int
    tokens: int


# Where a line between the logarithms of the quadratic kernels' times at 2,048 and 8,192 (forward: 8,192 and 32,768)
# meets the chunked kernels' time at 32,768, which is the same at any length: docs/figures/attention_*.json.
TABLE = (
    Crossover("NVIDIA H200", "squared", 64, "forward", sequences=128, tokens=8500),
    Crossover("NVIDIA H200", "squared", 64, "forward+backward", sequences=128, tokens=6300),
)


def crossover(device: str, score: str, head_dim: int, direction: str, sequences: int) -> int:
    """The longest T for the quadratic kernels, at `sequences` = B H.

    That of the entry with the nearest B H, by ratio; where the device, score, head dim or direction has none, the T at
    which both do the same number of products: a token's T (K + V) flops against C (K + V) + 4 D V, of states of D rows.
    """
    key = device, score, head_dim, direction
    entries = [entry for entry in TABLE if (entry.device, entry.score, entry.head_dim, entry.direction) == key]
    if entries:
        return min(entries, key=lambda entry: abs(math.log(entry.sequences / sequences))).tokens
    from pallas_kernels.chunked.attention import STAGES  # with the kernels, which are slow to import

    stages = STAGES[score]
    return stages.chunk + 2 * stages.rows(head_dim)
