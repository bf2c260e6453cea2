"""Several processes of one run: how they find each other, what the first does for all, and how they end together.

Each process runs the same program on its own devices, and all of them take part in every step, evaluation and save.
What is written or printed is the first one's. A process that ends ends the others: JAX's collectives fail, or its
coordination service, to which every process sends heartbeats, aborts them.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from train.errors import UserError, one_line
from train.keyboard import interrupts_kill

# Set by the launcher in each process that it starts, to their number; JAX reads the rest of what these two launchers
# set by itself. A shell inside an allocation has none of them, or 1.
PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

# A process that sends nothing for so long is taken for dead.
HEARTBEAT_SECONDS = 30


def join(options: ConfigDict) -> None:
    """Joins the run's other processes, before JAX makes any device; does nothing where there are none.

    `options` are the configuration's `distributed`: coordinator_address ("HOST:PORT" of process 0), num_processes and
    process_id; where all are None, SLURM and Open MPI are asked, through JAX. Raises UserError where they are
    incomplete or wrong. Where the others do not come within `options.timeout` seconds, the process ends with status 2.
    """
    keys = ("coordinator_address", "num_processes", "process_id")
    given = {key: options[key] for key in keys if options[key] is not None}
    if not given and not any(int(os.environ.get(name, 1)) > 1 for name in PROCESS_COUNTS):
        return
    if given:
        _check(given, keys)
    end_on_abort()
    try:
        with interrupts_kill():
            jax.distributed.initialize(
                **given,
                cluster_detection_method="deactivate" if given else None,
                initialization_timeout=options.timeout,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({one_line(error)}): give distributed.coordinator_address, a host and a "
            "free port of process 0, with distributed.num_processes and distributed.process_id"
        ) from error


def _check(given: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing = [f"distributed.{key}" for key in keys if key not in given]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: the three of config.distributed are given together, or none")
    address, count, process = (given[key] for key in keys)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"distributed.coordinator_address={address!r} must be HOST:PORT of process 0")
    if not 0 <= process < count:
        raise UserError(
            f"distributed.process_id={process} must be from 0 to {count - 1}, below distributed.num_processes={count}"
        )


def process_name() -> str:
    """What goes before an error of this process: nothing in a run of one."""
    return f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""


def on_first[T](function: Callable[[], T]) -> T:
    """What `function` returns, JSON values, on every process; it runs on the first, and the others wait.

    A UserError that it raises is raised on every process.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": function()}
        except UserError as error:
            outcome = {"error": str(error)}
    content = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    content = np.resize(content, size)  # the others' is of another size, and does not count
    outcome = json.loads(multihost_utils.broadcast_one_to_all(content).tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def first_before_others[T](function: Callable[[], T]) -> T:
    """What `function` returns; the first process runs it before the others, which find done what it leaves on a disk.

    A UserError that it raises on the first process is raised on every process.
    """
    results: list[T] = []
    on_first(lambda: results.append(function()))
    return results[0] if results else function()


# A reference for as long as the process lives: C has the pointer only.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _abort_handler(_: int) -> None:
    print(
        "error: this process lost the others: one of them ended (its own last line says why), did not come, or cannot "
        "be reached; give all of them the same command again to resume",
        file=sys.stderr,
    )
    _exit(2)


def end_on_abort() -> None:
    """Makes one line and status 2 of SIGABRT, by which JAX ends a process that has lost the others.

    JAX aborts from a thread of its own while the main thread waits in a collective, so a Python handler, which only
    the main thread runs, would never be called.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)


def leave(status: int) -> NoReturn:
    """Ends this process. One of several that fails does not wait for the others at its end: they wait for it."""
    if status and jax.distributed.is_initialized():
        _exit(status)
    sys.exit(status)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
