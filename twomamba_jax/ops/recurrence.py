"""Transitions of a state, S -> weight S + added: what a token, a chunk of them, or a device's slice does to it.

States are pytrees of arrays [B, G, ...], weights are [B, G]; axes may lead.
"""

import jax
import jax.numpy as jnp


def advance(state, weight, added):
    """The state after one transition."""
    return jax.tree.map(lambda old, new: _along(weight, old.ndim) * old + new, state, added)


def compose(first, second):
    """Two transitions, each (weight, added), as one."""
    return first[0] * second[0], advance(first[1], *second)


def compose_all(weights, added, reverse: bool = False):
    """N transitions, along the leading axis, as one; `reverse`: the last of them first.

    What each adds is multiplied by the product of the weights of those that follow it.
    """
    passed = jax.lax.cumprod(weights, axis=0, reverse=not reverse)
    one = jnp.ones_like(passed[:1])
    following = jnp.concatenate([one, passed[:-1]] if reverse else [passed[1:], one])
    total = jax.tree.map(lambda x: (_along(following, x.ndim) * x).sum(0), added)
    return passed[-1 if reverse else 0], total


def _along(weight, ndim: int):
    """`weight` with trailing axes of 1, for arrays of `ndim` axes that begin with its own."""
    return weight.reshape(*weight.shape, *[1] * (ndim - weight.ndim))
