"""Tile sizes: (kernel, capability among 80, 86, 90 and 100, score, head dim) -> tiles.

Each compiles without spills for every GPU that takes it (`pallas_kernels.triton.device.LIKE`).
"""

SCORES = ("linear", "squared", "exp")


def _tiles(own: int, streamed: int, warps: int, num_stages: int) -> dict[str, int]:
    return {"own": own, "streamed": streamed, "warps": warps, "num_stages": num_stages}


_ANY_SCORE = {
    ("forward", 80, 64): _tiles(128, 64, 8, 3),
    ("forward", 86, 64): _tiles(128, 64, 8, 3),
    ("forward", 90, 64): _tiles(64, 64, 4, 3),
    ("queries", 80, 64): _tiles(128, 64, 8, 2),
    ("queries", 86, 64): _tiles(128, 64, 8, 2),
    ("queries", 90, 64): _tiles(64, 64, 4, 3),
    ("keys", 80, 64): _tiles(128, 32, 8, 2),
    ("keys", 86, 64): _tiles(128, 32, 8, 2),
    ("keys", 90, 64): _tiles(64, 64, 4, 3),
    ("forward", 80, 128): _tiles(64, 32, 8, 2),
    ("forward", 86, 128): _tiles(128, 32, 8, 2),
    ("forward", 90, 128): _tiles(128, 64, 8, 2),
    ("queries", 80, 128): _tiles(128, 16, 8, 3),
    ("queries", 86, 128): _tiles(128, 16, 8, 3),
    ("queries", 90, 128): _tiles(128, 32, 8, 2),
    ("keys", 80, 128): _tiles(64, 32, 8, 2),
    ("keys", 86, 128): _tiles(64, 32, 8, 2),
    ("keys", 90, 128): _tiles(64, 32, 8, 2),
}

# A B200's queries spill with Hopper's tiles of heads of 64.
_ANY_SCORE |= {(name, 100, dim): tiles for (name, like, dim), tiles in _ANY_SCORE.items() if like == 90}
_ANY_SCORE["queries", 100, 64] = _tiles(64, 32, 4, 3)

TABLE = {
    (kernel, capability, score, head_dim): tiles
    for (kernel, capability, head_dim), tiles in _ANY_SCORE.items()
    for score in SCORES
}
