"""Triton kernels in tests: import this before anything that imports triton.

Without a GPU they are interpreted, from here on in this process; with one they are compiled.
"""

import contextlib
import importlib.util
import os
import types
from collections.abc import Iterator

import jax
import pytest

from pallas_kernels.triton.device import compiled_for

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("jax_triton") is None:
    pytest.skip("needs Triton: pip install 'twomamba-jax[triton]'", allow_module_level=True)

COMPILED = jax.default_backend() == "gpu"
if not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"


@contextlib.contextmanager
def as_on(capability: int) -> Iterator[None]:
    """Kernels traced inside are compiled to the code of an older GPU, and assembled for this one, which runs it."""
    import jax_triton.triton_lib as lib

    own = int(jax.devices()[0].compute_capability.replace(".", ""))
    library = lib.triton_kernel_call_lib

    def make(name, warps, ctas, shared, ptx, ttir, _, *rest):
        return library.TritonKernel(name, warps, ctas, shared, ptx, ttir, own, *rest)

    everything = {name: getattr(library, name) for name in dir(library) if not name.startswith("_")}
    lib.triton_kernel_call_lib = types.SimpleNamespace(**everything | {"TritonKernel": make})
    jax.clear_caches()  # of programs for this GPU
    try:
        with compiled_for(capability):
            yield
    finally:
        lib.triton_kernel_call_lib = library
        jax.clear_caches()
