"""Every Triton kernel with every entry of its table, as what `benchmarks/compile_triton.py` compiles."""

import itertools
from collections.abc import Iterator

from pallas_kernels.triton.chunked import programs as chunked
from pallas_kernels.triton.decoding import programs as decoding
from pallas_kernels.triton.quadratic import programs as quadratic


def programs() -> Iterator[dict]:
    """Entries with name, kernel, args (types of the pointers), constexprs, num_warps, num_stages and arch.

    `arch` are the compute capabilities that the entry is compiled for: 80, 86, 89, 90, 100, 120.
    """
    return itertools.chain(quadratic.programs(), chunked.programs(), decoding.programs())
