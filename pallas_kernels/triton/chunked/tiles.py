"""How the kernels cut their work on each architecture."""

import dataclasses

from pallas_kernels.triton.device import capability, like

CHUNK_MULTIPLE = 128  # what the tokens of a chunk are a multiple of


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a kernel.

    Attributes:
      block: tokens, or entries of a state, that a program takes at a time.
      num_warps: of a program.
      num_stages: of its loop's pipeline.
      held: tiles of a state that a program sums at a time.
      parts: programs that share the rows of a state.
      awaits: whether a turn of its loop ends with a use of its sums, for which Triton waits.
    """

    block: int
    num_warps: int
    num_stages: int
    held: int = 1
    parts: int = 1
    awaits: bool = False


READING = "query", "gradient"

BEFORE_HOPPER = 80, 86

# (kernel, capability, head dim). On Hopper most kernels that weigh their left operand in registers have one stage, or
# wait for their products: else a turn of the loop would overwrite it while the product of the turn before reads it, in
# PTX or in the machine code that some ptxas makes of it (`benchmarks/ptx_lint.py`, `benchmarks/sass_lint.py`).
TABLE = {
    **{("squared_update", capability, 64): Tiles(64, 4, 3, held=2) for capability in BEFORE_HOPPER},
    **{("squared_query", capability, 64): Tiles(64, 4, 3) for capability in BEFORE_HOPPER},
    **{("squared_gradient", capability, 64): Tiles(128, 4, 3) for capability in BEFORE_HOPPER},
    **{("squared_normalizer", capability, 64): Tiles(64, 4, 3) for capability in BEFORE_HOPPER},
    **{(f"linear_{kernel}", capability, 64): Tiles(128, 8, 1) for kernel in READING for capability in BEFORE_HOPPER},
    **{(f"linear_{kernel}", capability, 128): Tiles(64, 8, 1) for kernel in READING for capability in BEFORE_HOPPER},
    ("squared_update", 90, 64): Tiles(64, 4, 3, held=4),
    ("squared_query", 90, 64): Tiles(64, 4, 2, awaits=True),
    ("squared_gradient", 90, 64): Tiles(128, 4, 3),
    ("squared_normalizer", 90, 64): Tiles(64, 4, 1),
    ("linear_update", 90, 64): Tiles(64, 4, 1),
    ("linear_update", 90, 128): Tiles(64, 4, 1, parts=2),
    **{(f"linear_{kernel}", 90, dim): Tiles(64, 4, 1) for kernel in READING for dim in (64, 128)},
    **{("linear_update", capability, 64): Tiles(64, 4, 3) for capability in BEFORE_HOPPER},
    **{("linear_update", capability, 128): Tiles(64, 4, 2, parts=2) for capability in BEFORE_HOPPER},
    **{("scan", capability): Tiles(1024, 4, 4) for capability in (*BEFORE_HOPPER, 90)},
}
TABLE |= {(kernel, 100, *dim): tiles for (kernel, capability, *dim), tiles in TABLE.items() if capability == 90}
TABLE["squared_query", 100, 64] = Tiles(64, 4, 4)  # whose products read no registers


def tiles_of(kernel: str, *head_dim: int) -> Tiles:
    """Those of a kernel on the GPU that it is compiled for."""
    return TABLE[(kernel, like(capability()), *head_dim)]
