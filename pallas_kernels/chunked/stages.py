"""What a score is to the chunked form: how its states are made and read."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class StateArrays(NamedTuple):
    """The public state: kv [B, G, D, V] and key_sum [B, G, D], float32, of D features of the keys."""

    kv: jax.Array
    key_sum: jax.Array


class States(NamedTuple):
    """A state before each of N chunks, in the score's tiles: kv bfloat16; its normaliser float32, or of squared scores
    the sum of two numbers in bfloat16, [B, G, N, 2, ...].
    """

    kv: jax.Array
    normalizer: jax.Array


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a score, with phi the features of a key.

    A state S is a pair (kv, normaliser) of arrays [B, G, N, tiles, ...], whose rows the score arranges. Where a stage
    takes weights [B, heads, T] float32, None is 1.

    Attributes:
      degree: of the score, as a power of <q, k>.
      head_dims: K = V that its kernels have.
      rows: (K) -> D, the rows of a state in its tiles.
      chunk: tokens of a chunk where nothing else is asked for.
      tiles: how the kernels cut a chunk where nothing else is asked for.
      multiple: (tiles) -> what the tokens of a chunk are a multiple of.
      pack: (StateArrays) -> a state without the axis N; so are gradients of states packed.
      unpack: the inverse of `pack`, of (kv, normaliser).
      add: (problem, x, w, weight, factor) -> what each chunk adds to the state: sum_t weight_t phi(x_t) w_t^T and
        sum_t factor_t phi(x_t), over the heads of a group too, float32.
      scan: (added, weight [B, G, N], initial, reverse, other, with_normalizer) -> the `States` before each step; the
        pair after the last, float32, with S_c = weight_c S_{c-1} + added_c; and the inner products [B, G, N] float32
        of the states before each step and `other` ones, or None without.
      query: (problem, x, states, weight, added, power, own_norm, floor) -> added + weight S^T phi(power x); the weight
        is [B, G, T]. With own_norm it divides: see `query.query`.
      gradient: (problem, x, w, weight, states, added, factor, want_sums) -> added + dx, of the gradient dx of
        <phi(x), weight S w + factor z> by x, with z the normaliser; factor None: without it. If `want_sums` also
        <x, dx> / degree [B, heads, T] float32.
    """

    degree: int
    head_dims: tuple[int, ...]
    rows: Callable[[int], int]
    chunk: int
    tiles: Any
    multiple: Callable[[Any], int]
    pack: Callable
    unpack: Callable
    add: Callable
    scan: Callable
    query: Callable
    gradient: Callable
