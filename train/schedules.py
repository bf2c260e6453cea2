"""Learning rates: a warm-up from 0, then one of three ways down from the peak.

    rate(step) = peak step / warmup                                        step < warmup
    rate(step) = peak (final + (1 - final) shape(step))                    warmup <= step <= end, then peak final

with u = (end - step) / (end - warmup), which falls from 1 to 0, and

    linear   shape = u                                    the paper's (Appendix B)
    cosine   shape = (1 - cos(pi u)) / 2                  Loshchilov & Hutter, arXiv 1608.03983
    wsd      shape = min(1, (end - step) / cooldown)      warm-up, stable, decay: Hu et al., arXiv 2404.06395

A run that ends before its warm-up does (a trial of a few steps) rises to its end; optax's joined schedules refuse it.
"""

import math

import jax
import jax.numpy as jnp
import optax

from train.errors import UserError, nearest

# From the steps that are left, those from the warm-up's end to the end, and the cooldown, to the share of the peak.
SHAPES = {
    "linear": lambda left, falling, cooldown: left / falling,
    "cosine": lambda left, falling, cooldown: (1 - jnp.cos(math.pi * left / falling)) / 2,
    "wsd": lambda left, falling, cooldown: jnp.minimum(left / cooldown, 1),
}


def make_schedule(
    name: str,
    peak: float,
    warmup_steps: int,
    decay_steps: int,
    final_fraction: float = 0.0,
    cooldown_steps: int | None = None,
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      name: a key of `SHAPES`.
      peak: the largest rate.
      warmup_steps: where it is reached.
      decay_steps: the end, at which the rate is `final_fraction` of the peak and stays so.
      final_fraction: from 0 to 1.
      cooldown_steps: of `wsd`, the steps of the decay, the last before the end; None for the others.

    Raises:
      UserError: an unknown name, or numbers that are no schedule, each in one line.
    """
    if name not in SHAPES:
        raise UserError(f"unknown optimizer.schedule {name!r}; {nearest(name, SHAPES)}")
    if warmup_steps < 0:
        raise UserError(f"optimizer.warmup_steps={warmup_steps} must not be negative")
    if decay_steps < 1:
        raise UserError(
            f"the step where the learning rate ends, optimizer.decay_steps={decay_steps}, must be at least 1"
        )
    if not 0 <= final_fraction <= 1:
        raise UserError(f"optimizer.final_fraction={final_fraction} must be from 0 to 1: it is a share of the peak")
    if (cooldown_steps is not None) != (name == "wsd"):
        raise UserError(
            f"optimizer.cooldown_steps={cooldown_steps} does not go with optimizer.schedule={name!r}: it is the number "
            "of steps in which 'wsd' decays, and None for the others"
        )
    if cooldown_steps is not None and not 1 <= cooldown_steps <= decay_steps - warmup_steps:
        raise UserError(
            f"optimizer.cooldown_steps={cooldown_steps} must be from 1 to the steps between warm-up and end, "
            f"{decay_steps} - {warmup_steps}"
        )

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        left = jnp.maximum(decay_steps - step, 0)
        shape = SHAPES[name](left, max(decay_steps - warmup_steps, 1), cooldown_steps)
        falling = final_fraction + (1 - final_fraction) * shape
        return peak * jnp.where(step < warmup_steps, step / max(warmup_steps, 1), falling)

    return schedule
