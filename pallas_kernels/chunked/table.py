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


# From docs/kernels.md and docs/chunked_kernels.md: the quadratic kernels' times at T = 2,048, 8,192 and 32,768 with a
# line between their logarithms, and the chunked kernels', which are those of T = 16,384 and 32,768 at any length.
TABLE = (
    Crossover("NVIDIA H200", "squared", "forward", sequences=128, tokens=9600),
    Crossover("NVIDIA H200", "squared", "forward+backward", sequences=128, tokens=7900),
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
