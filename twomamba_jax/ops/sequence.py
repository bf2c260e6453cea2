"""What the devices that share a sequence pass on to each other: a state, from each to all after it.

A device turns the state before its tokens into weight S + state, and so do several devices one after the other. So an
associative scan across devices finds the state that enters each one, in 1 + log2(n) rounds of messages of the size of a
state, or 1 + log2(n - 1) where there is none before the first, rounded up, whatever the number of tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from twomamba_jax.ops import recurrence


@dataclasses.dataclass(frozen=True)
class SequenceAxis:
    """A mesh axis over which the tokens are sharded, as seen inside `jax.shard_map`: device d has their d-th slice.

    Attributes:
      name: of the mesh axis, or the names of several.
      size: n, the devices along it.
    """

    name: str | tuple[str, ...]
    size: int

    @property
    def index(self) -> jax.Array:
        """d, which device this is."""
        return jax.lax.axis_index(self.name)

    def receive(self, x, distance: int = 1, reverse: bool = False):
        """The x of the device `distance` before this one (`reverse`: after it), and zeros where there is none."""
        pairs = [(i, i + distance) for i in range(self.size - distance)]
        return jax.lax.ppermute(x, self.name, [pair[::-1] for pair in pairs] if reverse else pairs)

    def enter(self, weights, added, initial, reverse: bool = False):
        """The state before this device's first of N transitions S_c = weights_c S_{c-1} + added_c, on every device.

        Args:
          weights: [N, B, G].
          added: a pytree of arrays [N, B, G, ...].
          initial: the state before the first device's first transition, without the axis N; None: zero.
          reverse: whether the last device's last transition comes first.
        """
        weight, state = recurrence.compose_all(weights, added, reverse)
        weight, state = self.receive((weight, state), 1, reverse)
        if initial is not None:
            is_first = self.index == (self.size - 1 if reverse else 0)
            state = jax.tree.map(lambda x, first: jnp.where(is_first, first.astype(x.dtype), x), state, initial)
        # The last device's state is composed of the n - 1 devices' before it, and of the initial one.
        distance, composed = 1, self.size - (initial is None)
        while distance < composed:
            # Where there is no device that far, weight and state are 0, which changes no state.
            weight, state = recurrence.compose(self.receive((weight, state), distance, reverse), (weight, state))
            distance *= 2
        return state

    def first(self, x):
        """x on the first device, and zeros on the others."""
        is_first = self.index == 0
        return jax.tree.map(lambda x: jnp.where(is_first, x, 0), x)

    def last(self, x):
        """The last device's x, on all."""
        is_last = self.index == self.size - 1
        return jax.tree.map(lambda x: jax.lax.psum(jnp.where(is_last, x, 0), self.name), x)

    def gather(self, x):
        """[N, ...] of every device, one after the other: [n N, ...]."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.name, tiled=True), x)

    def sum_before(self, x):
        """The sum of x over the devices before this one."""
        everywhere = jax.lax.all_gather(x, self.name)
        is_before = (jnp.arange(self.size) < self.index).reshape(-1, *[1] * x.ndim)
        return jnp.where(is_before, everywhere, 0).sum(0)
