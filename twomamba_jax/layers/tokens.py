"""Tokens as callers hand them over: integers of the model's vocabulary, in rows that may be packed or padded."""

import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.ops.checks import as_rows
from twomamba_jax.ops.known import known, place_of
from twomamba_jax.shapes import Lengths, SegmentIds, Tokens


def as_tokens(
    tokens, vocab_size: int, segment_ids=None, lengths=None, shortest: int = 0
) -> tuple[Tokens, SegmentIds | None, Lengths | None]:
    """The same as JAX arrays, from arrays of any kind or lists.

    Of each row only the tokens that count are looked at. Values are checked where they are known, which inside
    `jax.jit` they are not.

    Raises:
      ValueError: rows of different length, no integers [B, T], T of 0, a token that the model does not have; segment
        ids or lengths as in `as_rows`.
    """
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError as error:
            raise ValueError(
                "tokens must be rows of one length [B, T]: pad shorter ones on the right, and say with lengths [B] how "
                "many tokens of each count"
            ) from error
    if tokens.ndim != 2 or tokens.shape[1] < 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T] with T >= 1, got {tokens.dtype} {tokens.shape}")
    segment_ids, lengths = as_rows(tokens.shape, segment_ids, lengths, shortest)
    if known(tokens, lengths):
        values = np.asarray(tokens)
        wrong = (values < 0) | (values >= vocab_size)
        if lengths is not None:
            wrong &= np.arange(values.shape[1]) < np.asarray(lengths)[:, None]
        if wrong.any():
            row, column = place_of(wrong)
            raise ValueError(
                f"tokens[{row}, {column}]={values[row, column]} is no token of the model, which has 0 to "
                f"{vocab_size - 1}: encode with the model's own tokenizer, and mark padding with lengths"
            )
    return jnp.asarray(tokens), segment_ids, lengths
