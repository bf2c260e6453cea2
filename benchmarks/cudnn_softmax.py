"""Softmax attention by cuDNN in the place of ours, for a training step to compare with."""

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax

from twomamba_jax.layers import execution, mixer

NAME = "cudnn"
VARIANT = "softmax"  # what it can compute
PRIMITIVE = "dot_product_attention_fwd"  # what JAX calls cuDNN's forward pass


def attention(q, k, v, log_decay, *, score, scale, **how):
    """Causal attention of whole rows: cuDNN has no decay, and documents in a row are not kept apart."""
    del how
    if score != "exp" or log_decay is not None:
        raise ValueError(f"cuDNN's attention is softmax without a decay: expected the variant {VARIANT}")
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation=NAME)


def dear(primitive, *arguments, **parameters) -> bool:
    """As `execution.DEAR`, and what cuDNN's backward pass needs of its forward pass."""
    return primitive.name.startswith(PRIMITIVE) or execution.DEAR(primitive, *arguments, **parameters)


@contextlib.contextmanager
def softmax_by_cudnn() -> Iterator[None]:
    """Within it, models that are traced attend by cuDNN."""
    remat = {"dots": functools.partial(nn.remat, policy=dear)}
    with mock.patch.object(mixer, "decay_attention", attention), mock.patch.dict(execution.REMATS, remat):
        yield
