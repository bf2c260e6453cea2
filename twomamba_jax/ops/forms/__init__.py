"""The operation computed in one form or another: the same numbers, by other products (see `ops.decay_attention`)."""
