"""Measured tile sizes: (device kind, score, head dim, largest T) -> tiles of the forward, queries' and keys' kernel.

`benchmarks/tune.py` writes entries of other devices, scores, head dims and lengths beside these.
"""

TABLE = {
    ("NVIDIA H200", "squared", 64, 8192): (
        {"own": 128, "streamed": 128, "num_stages": 3},
        {"own": 128, "streamed": 64, "num_stages": 4},
        {"own": 128, "streamed": 64, "resident": False, "num_stages": 3},
    ),
    ("NVIDIA H200", "exp", 64, 8192): (
        {"own": 128, "streamed": 128, "resident": False, "num_stages": 3},
        {"own": 128, "streamed": 64, "num_stages": 4},
        {"own": 128, "streamed": 64, "resident": False, "num_stages": 3},
    ),
    ("NVIDIA H200", "linear", 64, 8192): (
        {"own": 128, "streamed": 128, "num_stages": 3},
        {"own": 128, "streamed": 64, "num_stages": 4},
        {"own": 128, "streamed": 64, "resident": False, "num_stages": 3},
    ),
} | {
    ("NVIDIA H200", score, 128, 8192): (
        {"own": 128, "streamed": 64, "num_stages": 3},
        {"own": 128, "streamed": 64, "resident": False, "num_stages": 3},
        {
            "own": 128,
            "streamed": 64,
            "resident": False,
            "consumer_registers": 240,
            "producer_registers": 24,
            "part": 32,
            "num_stages": 2,
        },
    )
    for score in ("squared", "exp", "linear")
}
