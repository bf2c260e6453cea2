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


# Of the H100 measured length by length; of the H200 where a line between the logarithms of the quadratic kernels' times
# at 2,048 and 8,192 (forward: 8,192 and 32,768) meets the time in chunks at 32,768: docs/figures.
TABLE = (
    Crossover("NVIDIA H100 80GB HBM3", "linear", 64, "forward", sequences=256, tokens=2200),
    Crossover("NVIDIA H100 80GB HBM3", "linear", 64, "forward+backward", sequences=512, tokens=1700),
    Crossover("NVIDIA H100 80GB HBM3", "linear", 128, "forward+backward", sequences=256, tokens=1800),
    Crossover("NVIDIA H100 80GB HBM3", "squared", 64, "forward", sequences=64, tokens=9100),
    Crossover("NVIDIA H100 80GB HBM3", "squared", 64, "forward+backward", sequences=128, tokens=6500),
    Crossover("NVIDIA H200", "squared", 64, "forward", sequences=128, tokens=8500),
    Crossover("NVIDIA H200", "squared", 64, "forward+backward", sequences=128, tokens=6300),
)


def crossover(device: str, score: str, head_dim: int, direction: str, sequences: int) -> int | None:
    """The longest T for the quadratic kernels, at `sequences` = B H.

    That of the device's entry with the nearest B H, by ratio; where the device has none, of any device's, since all are
    Hopper's; None where the score, head dim or direction has none.
    """
    key = score, head_dim, direction
    entries = [entry for entry in TABLE if (entry.score, entry.head_dim, entry.direction) == key]
    entries = [entry for entry in entries if entry.device == device] or entries
    if not entries:
        return None
    return min(entries, key=lambda entry: abs(math.log(entry.sequences / sequences))).tokens


def equal_products(chunk: int, rows: int) -> int:
    """The T at which both do the same number of products: T (K + V) flops a token against C (K + V) + 4 D V, K = V.

    Of chunks of C tokens, and states of D rows.
    """
    return chunk + 2 * rows
