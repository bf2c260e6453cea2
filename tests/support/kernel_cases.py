"""Calls of the kernels for their tests, and how far the results may be from the oracle's.

A rounding to bfloat16 errs by at most U = 2^-8 of what is rounded (float16: 2^-11), in the root mean square by 0.41 U,
and by no more than 3^-1/2 U whatever the numbers. Results are rounded, and so is the left operand of every product. So
a result that is a sum of terms, each rounded once, errs by U of itself where it is written, and before by a random sum
of standard deviation 0.41 U size, size^2 being the sum of the squared terms:

    |error| <= U (|want| + SPREAD size)

`error_sizes` computes the sizes from the inputs alone, in float64. With w_ij the weights (over their sum, if that is
what y is), s_ij = dw_ij / d<q_i, k_j>, t_ij = <dy_i, v_j>, less <dy_i, y_i> if normalised, and W_ij = w_ij t_ij:

    result  terms                                                  what is rounded in them
    y_i     w_ij v_j, w_ij y_i                                     the weight; in the row's sum too
    dv_j    w_ij dy_i                                              the weight
    dq_i    s_ij t_ij k_j, e_i sum_j s_ij k_j                      s_ij t_ij; y in <dy, y>
    dk_j    s_ij t_ij q_i, e_i s_ij q_i                            the same
    da_t    e_i sum_(j<t) w_ij, r_i sum_(j<t) W_ij, over i >= t    y in <dy, y>; the row's sum

e_i = (sum_v dy_iv^2 (|y_iv| + size of y_iv)^2)^1/2 is what <dy_i, y_i> errs by, in units of U, and
r_i = (sum_j w_ij^2)^1/2 what the row's sum does, relatively; both are 0 without normalisation. dlog_decay is float32,
and W is never rounded to bfloat16. What is computed in float32 errs by less than FINE of what it is computed from; a
sum of decays by CHUNK^1/2 roundings; and weights below 2^-126, the smallest normal float32, are 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from support import oracle

from twomamba_jax import decay_attention

FINE = 2.0**-20
SPREAD = 2.5  # six standard deviations
ROOT_MEAN_SQUARE = 3**-0.5
SMALLEST = 2.0**-100  # 2^-126 of T |t| |q|
CHUNK = 128  # tokens whose decays are summed up
INPUTS = ("q", "k", "v", "log_decay")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arrays of a call, a cotangent of its result, and its keywords."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    dy: jax.Array
    options: dict
    implementation: str = "mosaic_gpu"

    @property
    def unit(self) -> float:
        """U."""
        return float(jnp.finfo(self.q.dtype).eps) / 2

    def replace(self, **changes) -> "Call":
        """The call with other arrays, or other keywords."""
        arrays = {name: changes.pop(name) for name in (*INPUTS, "dy") if name in changes}
        return dataclasses.replace(self, **arrays, options=self.options | changes)

    @property
    def inputs(self) -> tuple[jax.Array | None, ...]:
        """What the result is differentiated by."""
        return self.q, self.k, self.v, self.log_decay

    def operation(self, *inputs, **options) -> jax.Array:
        """The kernels' y, of other inputs."""
        how = {"form": "parallel", "implementation": self.implementation}
        return decay_attention(*inputs, **how, **self.options, **options)

    def gradients(self, dy, *inputs) -> dict[str, jax.Array]:
        """y, and the gradients of <dy, y> by their input, as the kernels compute them."""
        y, pull = jax.vjp(self.operation, *inputs)
        return {name: x for name, x in zip(("y", *INPUTS), (y, *pull(dy))) if x is not None}

    def run(self) -> dict[str, jax.Array]:
        """The same of the call's own arrays; calls that differ in numbers alone compile once."""
        rows = {name: x for name, x in self.options.items() if isinstance(x, jax.Array | np.ndarray)}
        rest = tuple((name, x) for name, x in self.options.items() if name not in rows)
        return _run(self.dy, self.inputs, rows, rest, self.implementation)

    def oracle(self) -> dict[str, np.ndarray]:
        """The same from the definition in float64."""
        y, _ = oracle.forward(*self.inputs, **self.options)
        return {"y": y} | oracle.gradients(self.dy, None, *self.inputs, **self.options)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _run(dy, inputs, rows, rest, implementation):
    return Call(*inputs, dy, rows | dict(rest), implementation).gradients(dy, *inputs)


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of a call, as the operation names them."""

    score: str = "squared"
    normalize: bool = True
    decay: bool = True
    segments: bool = False
    lengths: bool = False
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 64
    tokens: int = 130
    batch: int = 1
    dtype: str = "bfloat16"
    implementation: str = "mosaic_gpu"

    def __str__(self):
        flags = [name for name in ("normalize", "decay", "segments", "lengths") if getattr(self, name)]
        flags += [self.dtype] * (self.dtype != "bfloat16")
        sizes = [f"B{self.batch}", f"T{self.tokens}", "H{}G{}".format(*self.heads), f"K{self.head_dim}"]
        return "-".join([self.score, *sizes, *flags])

    def call(self) -> Call:
        """Random arrays for these settings."""
        rng = np.random.default_rng(list(str(self).encode()))
        (heads, kv_heads), shape = self.heads, (self.batch, self.tokens)

        def normal(count):
            return jnp.asarray(rng.normal(size=(*shape, count, self.head_dim)), self.dtype)

        q, k, v, dy = (normal(count) for count in (heads, kv_heads, kv_heads, heads))
        if self.score == "linear" and self.normalize:
            q, k = abs(q), abs(k)  # its denominators are sums of scores, which must not be negative
        decay = jnp.asarray(-rng.exponential(0.1, (*shape, kv_heads)), jnp.float32)
        ids = jnp.asarray(np.cumsum(rng.random(shape) < 1 / 40, axis=1) % 3)  # they recur
        lengths = jnp.asarray([self.tokens - self.tokens // 3, 0][: self.batch])
        options = {"score": self.score, "normalize": self.normalize}
        options |= {"segment_ids": ids} if self.segments else {}
        options |= {"lengths": lengths} if self.lengths else {}
        return Call(q, k, v, decay if self.decay else None, dy, options, self.implementation)


UNDERFLOWING = ("a key without weight", "a key with all the weight")


def underflowing_call(kind: str, implementation: str) -> Call:
    """Of a large key that has decayed to nothing, or nearly so, where queries meet it.

    It has no weight, beside a query's own small score; or all the weight of a hundred rows.
    """
    tokens, late, large = 256, 128, 2.0**15
    q, k = np.zeros((2, 1, tokens, 1, 64), np.float32)
    decay = np.full((1, tokens, 1), -1.5, np.float32)
    k[0, 0, 0, 0] = large
    if kind == UNDERFLOWING[0]:
        q[0, late, 0, 0], q[0, late, 0, 1], k[0, late, 0, 1] = large, 2.0**-20, 2.0**-20
    else:
        q[0, late : late + 100, 0, 0] = large
        decay[:, :late], decay[:, late:] = -0.68, 0
    q, k, ones = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, np.ones(q.shape)))
    options = {"score": "squared", "normalize": True, "scale": 1.0}
    return Call(q, k, ones, jnp.asarray(decay), ones, options, implementation)


def assert_close(call: Call, got: dict[str, jax.Array], fine: float | None = None) -> None:
    """y and every gradient are as close to the oracle's as the roundings let them be.

    fine: by how much of the largest gradient of a decay all of them may err, instead of FINE of each: where logarithms
    in base 2 of rows' sums are large, 2^-24 times the largest; a weight is 2 to its power, and sums of them cancel.
    """
    want, size, unit = call.oracle(), error_sizes(call), call.unit
    assert got.keys() == want.keys()
    for name, x in got.items():
        error, magnitude = np.abs(np.asarray(x).astype(np.float64) - want[name]), np.abs(want[name])
        rounding = (FINE if name == "log_decay" else unit) * magnitude
        if name == "log_decay" and fine is not None:
            rounding = fine * magnitude.max()
        bound = rounding + SPREAD * unit * size[name] + SMALLEST
        worst = np.unravel_index(np.argmax(np.nan_to_num(error - bound, nan=np.inf)), error.shape)
        assert (error <= bound).all(), (name, worst, np.asarray(x)[worst], want[name][worst], bound[worst])
        if name != "log_decay" and call.q.shape[1] > 50:  # enough numbers, with roundings of their own, for a mean
            mean = np.sqrt((magnitude**2 + size[name] ** 2).mean())
            assert np.sqrt((error**2).mean()) <= ROOT_MEAN_SQUARE * unit * mean, (name, error)


def error_sizes(call: Call) -> dict[str, np.ndarray]:
    """The `size` of every entry of y and the gradients."""
    q, k, v, dy = (np.asarray(x).astype(np.float64) for x in (call.q, call.k, call.v, call.dy))
    batch, tokens, heads, groups = *q.shape[:3], k.shape[2]
    decay = np.zeros(k.shape[:3]) if call.log_decay is None else np.asarray(call.log_decay, np.float64)
    ids = np.asarray(call.options.get("segment_ids", np.zeros((batch, tokens), int)))
    segment = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), axis=1)
    lengths = np.asarray(call.options.get("lengths", np.full(batch, tokens)))
    squares = {name: np.zeros(x.shape) for name, x in zip(("y", *INPUTS), (q, q, k, v, decay))}
    for b, h in np.ndindex(batch, heads):
        n, g = lengths[b], h * groups // heads
        head = (q[b, :n, h], k[b, :n, g], v[b, :n, g], decay[b, :n, g], segment[b, :n], dy[b, :n, h])
        for name, place, square in zip(squares, (h, h, g, g, g), _squared_sizes(call.options, call.unit, *head)):
            squares[name][b, :n, place] += square
    return {name: np.sqrt(square) for name, square in squares.items()}


def _squared_sizes(options, unit, q, k, v, decay, segment, dy):
    """Of y, dq, dk, dv [T, .] and dlog_decay [T] of one head."""
    normalize, scale = options["normalize"], options.get("scale", q.shape[1] ** -0.5)
    x, total = scale * q @ k.T, np.cumsum(np.maximum(decay, oracle.MIN_LOG_DECAY))
    seen = np.tril(segment[:, None] == segment)
    w, s = _weights(options["score"], normalize, x, np.where(seen, total[:, None] - total, -np.inf))
    s = scale * s
    y, t = w @ v, dy @ v.T - normalize * (dy * (w @ v)).sum(axis=1, keepdims=True)

    r2 = normalize * (w**2).sum(axis=1)
    y2 = w**2 @ v**2 + r2[:, None] * y**2
    e2 = normalize * (dy**2 * (np.abs(y) + np.sqrt(y2)) ** 2).sum(axis=1)
    dy_length, v_length, y_length = (np.linalg.norm(a, axis=1) for a in (dy, v, y))
    t2 = t**2 + (FINE / unit * dy_length[:, None] * (v_length + normalize * y_length[:, None])) ** 2
    dq2 = s**2 * t2 @ k**2 + e2[:, None] * (s @ k) ** 2
    dk2 = (s**2 * (t2 + e2[:, None])).T @ q**2
    dv2 = (w**2).T @ dy**2

    last_decays = total - np.pad(total, (CHUNK, 0))[: len(total)]
    r2 = r2 + CHUNK * (2.0**-24 / unit * last_decays) ** 2
    w_before, change_before = (np.cumsum(a, axis=1) - a for a in (w, w * t))  # the sums over j < t
    da2 = np.tril(e2[:, None] * w_before**2 + r2[:, None] * change_before**2).sum(axis=0)
    return y2, dq2, dk2, dv2, da2 + (FINE / unit) ** 2 * (w**2 * t2).sum()


def _weights(score, normalize, x, logs):
    """The weights, over their sums if `normalize`, and their derivatives by the scores x."""
    if score == "exp":
        logs = x + logs
        logs = logs - normalize * logs.max(axis=1, keepdims=True, initial=-np.inf)
    factor = np.exp(logs)
    w, s = {"linear": (x, 1.0), "squared": (x**2, 2 * x), "exp": (1.0, 1.0)}[score]
    w, s = w * factor, s * factor
    if not normalize:
        return w, s
    sums = w.sum(axis=1, keepdims=True)
    return tuple(np.divide(a, sums, out=np.zeros_like(a), where=sums > 0) for a in (w, s))
