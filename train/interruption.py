"""Signals as a request: the loop finishes its step, saves, and the program ends with status 0.

They are those by which a person or a batch system ends a program (SIGTERM, SIGINT), a terminal that goes away (SIGHUP),
and batch systems shortly before a limit (SIGUSR1, SIGUSR2, SIGXCPU). A signal to one of several processes stops them
all, at the same step.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip


class Interruption:
    """While it is entered, the first of `SIGNALS` sets `requested`; a second SIGINT raises KeyboardInterrupt.

    A SIGHUP that is ignored (nohup) stays ignored. Only a main thread can take signals; entered in another it does
    nothing, and whoever owns the main thread decides.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Takes nothing yet; `mesh` is of all devices of all processes."""
        self.requested = False
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
        self._before: dict[int, Any] = {}
        self._votes: jax.Array | None = None

    def agreed(self) -> bool:
        """Whether the run is to stop, the same answer in all processes; each calls it once a step.

        One process answers at once. Several sum an integer over their devices behind the step under way, and answer
        with the sum of the step before: nothing waits, and a request is heard one step later.
        """
        if jax.process_count() == 1:
            return self.requested
        vote = np.full(jax.local_device_count(), self.requested, np.int32)
        vote = jax.make_array_from_process_local_data(self._sharding, vote)
        before, self._votes = self._votes, self._sum(vote)
        return before is not None and int(before) > 0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
            self._before = {number: signal.signal(number, self._request) for number in SIGNALS if number not in ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
