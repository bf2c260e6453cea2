"""Settings for every test."""

import os
import signal
from pathlib import Path

import jax
import pytest
from support import annotations, garbage

# To import all tests and what they test makes much and leaves nothing.
garbage.collect_less()

# What a function of the library takes and returns is what its annotations say, in every test.
annotations.install()

# Nearly all of the suite's time is compilation. This turns off LLVM's optimisation of what is compiled (as JAX's own
# tests do), which halves it; the command lines that tests start in processes of their own are told the same.
jax.config.update("jax_disable_most_optimizations", True)

# No test reads or writes the cache of whoever runs them: not here, where `compilation_cache` below names another before
# the first test, and not in a process that a test starts. JAX looks once, at the first program, whether it has a cache.
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", None)
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


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """JAX's settings of a cache of this session's, for equal programs of several jitted functions, tests and processes.

    Each worker has its own: JAX does not keep one from reading what another has half written.
    """
    keys = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,  # a small program costs less than to keep it
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {key: getattr(jax.config, key) for key in keys}
    for key, value in keys.items():
        jax.config.update(key, value)
    yield keys
    for key, value in before.items():
        jax.config.update(key, value)


# Linux gives a process 65,530 memory maps; compiled programs take several each, and LLVM aborts where none is left.
MOST_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Lets go of compiled programs before they are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
