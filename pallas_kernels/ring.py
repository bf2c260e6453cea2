"""Shared memory buffers between the warpgroup that fills them and those that use them: a ring, or one for each."""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax


@dataclasses.dataclass(frozen=True)
class Ring:
    """`num_stages` buffers, used in turn: step i takes buffer i % num_stages.

    Attributes:
      num_stages: how many buffers.
      full: barriers that the arrivals of a buffer's contents complete.
      empty: barriers that the release of a buffer by every user completes.
    """

    num_stages: int
    full: Any
    empty: Any

    @staticmethod
    def barriers(num_stages: int, arrivals: int, users: int):
        """The types of `full` and `empty`: `arrivals` copies fill a buffer, `users` warpgroups release it."""
        return (
            plgpu.Barrier(num_barriers=num_stages, num_arrivals=arrivals),
            plgpu.Barrier(num_barriers=num_stages, num_arrivals=users),
        )

    def slot(self, step):
        """The buffer of a step."""
        return lax.rem(step, self.num_stages)

    def claim(self, step):
        """Waits, in the filling warpgroup, until the step's buffer is free, and returns its number."""
        slot = self.slot(step)

        @pl.when(step >= self.num_stages)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def receive(self, step):
        """Waits, in a using warpgroup, until the step's buffer is filled, and returns its number."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, step) -> None:
        """Says that this warpgroup is done with the step's buffer."""
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])

    def drain(self, steps) -> None:
        """Waits, in the filling warpgroup, until all buffers are free after `steps` steps.

        Every completion of a barrier must be observed by the thread that waits on it.
        """
        lax.fori_loop(
            lax.max(steps - self.num_stages, 0),
            steps,
            lambda step, _: plgpu.barrier_wait(self.empty.at[self.slot(step)]),
            None,
        )


class Handover(NamedTuple):
    """A buffer for each using warpgroup, filled once for each of its pieces of work.

    full: barriers that the arrivals of a buffer's contents complete; empty: barriers that its release completes.
    """

    full: Any
    empty: Any

    @staticmethod
    def barriers(users: int, arrivals: int) -> "Handover":
        """The types of the barriers: `arrivals` copies fill the buffer of each of the users."""
        return Handover(
            plgpu.Barrier(num_barriers=users, num_arrivals=arrivals),
            plgpu.Barrier(num_barriers=users),
        )

    def claim(self, user, i) -> None:
        """Waits, in the filling warpgroup, until a user's buffer is free for its i-th piece."""
        pl.when(i > 0)(lambda: self.drain(user))

    def receive(self, user) -> None:
        """Waits, in a using warpgroup, until its buffer is filled."""
        plgpu.barrier_wait(self.full.at[user])

    def release(self, user) -> None:
        """Says that a warpgroup is done with its buffer."""
        plgpu.barrier_arrive(self.empty.at[user])

    def drain(self, user) -> None:
        """Waits, in the filling warpgroup, until a user's buffer is free: after the last piece too, as in `Ring`."""
        plgpu.barrier_wait(self.empty.at[user])
