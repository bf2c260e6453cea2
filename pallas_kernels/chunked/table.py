"""From which length on the chunked kernels are faster than the quadratic ones.

`benchmarks/attention.py` prints the rows of TABLE that it has measured.
"""

import dataclasses
import math

from pallas_kernels.chunked.layout import HEAD_DIM, TILES
from pallas_kernels.chunked.problem import CHUNK


@dataclasses.dataclass(frozen=True)
class Crossover:
    """A measured crossover.

    Attributes:
      device: what JAX calls the device.
      score: of the attention, with heads of 64.
      direction: `forward` or `forward+backward`.
      sequences: B H at which it was measured.
      tokens: T at which both take the same time; the quadratic kernels are faster below.
    """

    device: str
    score: str
    direction: str
    sequences: int
    tokens: int


# Where a line between the logarithms of the quadratic kernels' times at 2,048 and 8,192 (forward: 8,192 and 32,768)
# meets the chunked kernels' time at 32,768, which is the same at any length: docs/figures/attention_*.json.
TABLE = (
    Crossover("NVIDIA H200", "squared", "forward", sequences=128, tokens=8500),
    Crossover("NVIDIA H200", "squared", "forward+backward", sequences=128, tokens=6300),
)


def crossover(device: str, score: str, direction: str, sequences: int) -> int:
    """The longest T for the quadratic kernels, at `sequences` = B H.

    That of the entry with the nearest B H, by ratio; where the device, score or direction has none, the T at which both
    do the same number of products: a token's T (K + V) flops against C (K + V) + 4 D V, of states of D rows.
    """
    key = device, score, direction
    entries = [entry for entry in TABLE if (entry.device, entry.score, entry.direction) == key]
    if entries:
        return min(entries, key=lambda entry: abs(math.log(entry.sequences / sequences))).tokens
    return CHUNK + 2 * TILES * HEAD_DIM
