"""Settings for every test."""

import os
import signal
from pathlib import Path

import jax
import pytest
from support import garbage

# Nearly all of the suite's time is compilation. This turns off LLVM's optimisation of what is compiled (as JAX's own
# tests do), which halves it; the programs that the command-line tests start in processes of their own are optimised.
jax.config.update("jax_disable_most_optimizations", True)

# No test reads or writes the cache of whoever runs them: not here, and not in a process that a test starts.
jax.config.update("jax_enable_compilation_cache", False)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

# A shell has what it runs in the background ignore SIGINT, and nohup SIGHUP; the programs that tests start would too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Interpreted kernels that run at the same time share threads and may wait for each other for ever: outside of `jax.jit`
# the next program starts when the one before has ended.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Even one of them has threads that wait for one another, each of which may hold one of XLA's: those have to be more.
# XLA reads this when its first device is asked for, and has a thread per core otherwise.
os.environ.setdefault("NPROC", "16")


def pytest_collection_finish():
    """What has been imported by now stays."""
    garbage.collect_less()


# Linux gives a process 65,530 memory maps; compiled programs take several each, and LLVM aborts where none is left.
MOST_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Lets go of compiled programs before they are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
