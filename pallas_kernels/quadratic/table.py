"""Measured tile sizes: (device kind, score, head dim, largest T) -> tiles of the forward, queries' and keys' kernel.

Written by `benchmarks/tune.py`.
"""

_SCORES = ("linear", "squared", "exp")
_64 = (
    {"own": 128, "streamed": 128, "stages": 3},
    {"own": 128, "streamed": 64, "stages": 4},
    {"own": 128, "streamed": 64, "stages": 3},
)
_128 = (
    {"own": 128, "streamed": 64, "stages": 3},
    {"own": 128, "streamed": 64, "stages": 3, "resident": False},
    {
        "own": 128,
        "streamed": 64,
        "stages": 2,
        "consumer_registers": 240,
        "producer_registers": 24,
        "resident": False,
        "part": 32,
    },
)

TABLE = {("NVIDIA H200", score, 64, 8192): _64 for score in _SCORES}
TABLE |= {("NVIDIA H200", score, 128, 8192): _128 for score in _SCORES}
