"""Compiled programs that outlive a process: JAX's persistent cache, in the user's own cache directory.

For the programs of this package's command lines. A library that is imported changes no such setting.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

MOST_BYTES = 2 * 2**30  # beyond this JAX deletes what was used the longest ago


def keep_programs(warn: Callable[[str], None]) -> None:
    """Has JAX keep compiled programs in `twomamba_jax/programs` under `XDG_CACHE_HOME`, or `~/.cache`.

    JAX's own settings come first: a directory of the user's (`JAX_COMPILATION_CACHE_DIR`) is left as it is, and
    `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing. `warn` is told in one line where nothing can be kept. It has to be
    called before anything is compiled.
    """
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    if importlib.util.find_spec("filelock") is None:
        warn("compiled programs are not kept, which needs the package 'filelock': pip install filelock")
        return
    try:
        directory = _directory()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        warn(
            f"compiled programs are not kept ({' '.join(str(error).split())}): set XDG_CACHE_HOME to a directory that "
            "can be written to, or JAX_ENABLE_COMPILATION_CACHE=0 to keep none"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _directory() -> Path:
    """Relative paths in XDG_CACHE_HOME are ignored, as its specification asks."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "twomamba_jax" / "programs"
