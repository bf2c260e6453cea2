"""The gradient of the log decays, from the sums of W over rows and columns of the weights."""

import jax
import jax.numpy as jnp

CHUNK = 128


def decay_gradient(row_sums, column_sums, segment):
    """da_t = sum of W_ij over pairs j < t <= i, for row_sums_i = sum_j W_ij and column_sums_j = sum_i W_ij.

    A pair counts in every row from j + 1 to i: da_t is the sum of row_sums - column_sums over the tokens from t on, in
    t's segment. It is taken in chunks, and a segment's sum never meets another's. Both kernels form W from the same
    numbers in float32, so that what should cancel does.

    Args:
      row_sums, column_sums: [B, G, T] float32.
      segment: [B, T] int32, the number of each token's segment in its row; None is one segment.

    Returns:
      [B, T, G] float32.
    """
    batch, heads, tokens = row_sums.shape
    chunks = -(-tokens // CHUNK)
    padding = chunks * CHUNK - tokens
    x = jnp.pad(row_sums - column_sums, ((0, 0), (0, 0), (0, padding))).reshape(batch, heads, chunks, CHUNK)
    later = (jnp.arange(CHUNK)[:, None] >= jnp.arange(CHUNK)).astype(x.dtype)  # [i, t]: i counts for t
    if segment is None:
        within = jnp.einsum("bgci,it->bgct", x, later, precision="highest")
        heads_of_chunks = within[..., 0]
        after = jax.lax.cumsum(heads_of_chunks, axis=2, reverse=True) - heads_of_chunks
        total = within + after[..., None]
    else:
        segments = jnp.pad(segment, ((0, 0), (0, padding)), mode="edge").reshape(batch, chunks, CHUNK)
        same = (segments[..., :, None] == segments[..., None, :]) * later
        within = jnp.einsum("bgci,bcit->bgct", x, same, precision="highest")
        # after_c: what the chunks after c add to the tokens of c's last segment. One chunk's part of it is the sum of
        # its first segment if that continues c's last, and the chunks after it count too if its last segment is the
        # same.
        first, last = segments[..., 0], segments[..., -1]
        continues = jnp.pad(first[:, 1:] == last[:, :-1], ((0, 0), (0, 1)))[:, None]
        through = jnp.pad(last[:, 1:] == last[:, :-1], ((0, 0), (0, 1)))[:, None]
        part = jnp.pad(within[..., 1:, 0], ((0, 0), (0, 0), (0, 1)))
        part = jnp.where(continues, part, 0)
        gate = jnp.broadcast_to(through, part.shape).astype(part.dtype)
        _, after = jax.lax.associative_scan(
            lambda late, early: (late[0] * early[0], early[0] * late[1] + early[1]), (gate, part), reverse=True, axis=2
        )
        total = within + jnp.where((segments == last[..., None])[:, None], after[..., None], 0)
    return jnp.moveaxis(total.reshape(batch, heads, -1)[..., :tokens], 1, 2)
