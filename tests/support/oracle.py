"""Float64 NumPy oracle of causal decay attention: the forward pass and every gradient, O(T^2).

Written from the formula of arXiv 2602.17363 alone; it shares no code with the library it checks.

For query head h reading kv head h // (H // G), with a = max(log_decay, -128):
  x_ij = scale <q_i, k_j>,  D_ij = a_{j+1} + ... + a_i,  w_ij = score(x_ij) exp(D_ij)
  y_i = sum_j w_ij v_j, divided by sum_j w_ij if normalize, over j <= i of the same segment, both valid.
"""

import numpy as np

MIN_DENOMINATOR = 2.0**-100
MIN_LOG_DECAY = -128.0
POWER = {"linear": 1, "squared": 2}


def _f64(x):
    """Any array-like as float64 (two steps, so that bfloat16 arrays convert too)."""
    return np.asarray(x).astype(np.float64)


def _pairs(dim):
    """Index pairs and weights of the symmetric square of R^dim, in cyclic offset order."""
    first, second, weight = [], [], []
    for s in range(dim // 2 + 1):
        count = s if 2 * s == dim else dim  # offset dim/2 meets each pair from both ends: keep half of them
        a = np.arange(count)
        first.append(a)
        second.append((a + s) % dim)
        weight.append(np.full(count, 1.0 if s == 0 else np.sqrt(2.0)))
    return np.concatenate(first), np.concatenate(second), np.concatenate(weight)


def symmetric_features(x):
    """phi [..., K(K+1)/2] with <phi(q), phi(k)> = <q, k>^2."""
    x = _f64(x)
    first, second, weight = _pairs(x.shape[-1])
    return weight * x[..., first] * x[..., second]


def _features(score, x):
    return x if score == "linear" else symmetric_features(x)


def _features_grad(score, x, dphi):
    """Gradient of sum(dphi * phi(x)) with respect to x [n, K]."""
    if score == "linear":
        return dphi
    first, second, weight = _pairs(x.shape[-1])
    dx = np.zeros(x.shape)
    np.add.at(dx, (slice(None), first), weight * dphi * x[:, second])
    np.add.at(dx, (slice(None), second), weight * dphi * x[:, first])
    return dx


class _Inputs:
    """The arguments in float64, with the defaults filled in."""

    def __init__(
        self, q, k, v, log_decay, *, score, normalize, scale=None, segment_ids=None, lengths=None, initial_state=None
    ):
        if score not in ("linear", "squared", "exp"):
            raise ValueError(f"unknown score {score!r}")
        self.q, self.k, self.v = _f64(q), _f64(k), _f64(v)
        self.score, self.normalize = score, normalize
        self.batch, self.tokens, self.heads, self.dim = self.q.shape
        self.groups, self.vdim = self.v.shape[2:]
        if self.heads % self.groups:
            raise ValueError("the query heads must be a multiple of the kv heads")
        self.scale = self.dim**-0.5 if scale is None else float(scale)
        decay = np.zeros(self.k.shape[:3]) if log_decay is None else _f64(log_decay)
        self.decay, self.clamped = np.maximum(decay, MIN_LOG_DECAY), decay < MIN_LOG_DECAY
        ids = np.zeros(self.k.shape[:2], int) if segment_ids is None else np.asarray(segment_ids)
        # Number the runs, so that a recurring id starts a segment of its own.
        self.segment = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), axis=1)
        self.lengths = np.full(self.batch, self.tokens) if lengths is None else np.asarray(lengths).astype(int)
        self.has_state = initial_state is not None
        if score == "exp":
            self.cache = self._initial_cache(initial_state)
        else:
            self.sums = self._initial_sums(initial_state)

    def _initial_cache(self, state):
        """The exp state as (keys, values, log_decay, start, length); an empty one of capacity T by default."""
        if state is not None:
            start, length = (np.asarray(state[name]).astype(int) for name in ("start", "length"))
            keys, values = _f64(state["keys"]), _f64(state["values"])
            decay = np.zeros(keys.shape[:3]) if state["log_decay"] is None else _f64(state["log_decay"])
            return keys, values, decay, start, length
        shape = (self.batch, self.groups, self.tokens)
        keys, values = np.zeros((*shape, self.dim)), np.zeros((*shape, self.vdim))
        return keys, values, np.zeros(shape), *np.zeros((2, self.batch), int)

    def _initial_sums(self, state):
        """The linear or squared state as (kv, key_sum); zeros by default."""
        if state is not None:
            return _f64(state[0]), _f64(state[1])
        features = self.dim if self.score == "linear" else self.dim * (self.dim + 1) // 2
        shape = (self.batch, self.groups, features)
        return np.zeros((*shape, self.vdim)), np.zeros(shape)

    def each_group(self):
        """Every (row, kv head) that has a valid token."""
        return (_Group(self, b, g) for b in range(self.batch) if self.lengths[b] > 0 for g in range(self.groups))


class _Group:
    """One row and kv head: the keys its valid tokens attend to, and the log decays (-inf = not attended)."""

    def __init__(self, inp, b, g):
        ratio, n = inp.heads // inp.groups, inp.lengths[b]
        self.b, self.g, self.n, self.heads = b, g, n, range(g * ratio, (g + 1) * ratio)
        # Only the valid tokens are ever read, so padding may hold anything, NaN included.
        self.k, self.v, decay, seg = inp.k[b, :n, g], inp.v[b, :n, g], inp.decay[b, :n, g], inp.segment[b, :n]
        i, j = np.ogrid[:n, :n]
        between = np.cumsum(np.where(i > j, decay[:, None], 0.0), axis=0)
        self.token_log = np.where((i >= j) & (seg[:, None] == seg), between, -np.inf)
        self.prefix = np.where(seg == 0, np.cumsum(decay), -np.inf)  # from the initial state to token i
        # Past the last token: the last row says how each token, and the initial state, enters the final state.
        self.to_end, self.carry = self.token_log[-1], self.prefix[-1]
        self.slots = np.zeros(0, int)
        self.keys, self.values, self.log = self.k, self.v, self.token_log
        if inp.score == "exp":
            keys, values, cached_decay, start, length = (x[b] for x in inp.cache)
            self.slots = np.arange(start, length)
            to_now = np.array([cached_decay[g, slot + 1 : length].sum() for slot in self.slots])
            slot_log = self.prefix[:, None] + to_now
            self.keys = np.concatenate([keys[g, self.slots], self.k])
            self.values = np.concatenate([values[g, self.slots], self.v])
            self.log = np.concatenate([slot_log, self.token_log], axis=1)
        self.sums = (inp.sums[0][b, g], inp.sums[1][b, g]) if inp.score != "exp" and inp.has_state else None


class _Head:
    """One query head's outputs y [n, V], with what the gradients need of them."""

    def __init__(self, inp, group, h):
        self.q = inp.q[group.b, : group.n, h]
        self.weight, self.slope = _weights(inp, inp.scale * self.q @ group.keys.T, group.log)
        self.normalize = inp.normalize
        self.y, self.denominator = self.weight @ group.values, self.weight.sum(axis=1)
        if group.sums is not None:
            kv, key_sum = group.sums
            self.coefficient = inp.scale ** POWER[inp.score] * np.exp(group.prefix)[:, None]
            self.phi = self.coefficient * _features(inp.score, self.q)
            self.carried, self.carried_sum = self.phi @ kv, self.phi @ key_sum
            self.y = self.y + self.carried
            self.denominator = self.denominator + np.maximum(self.carried_sum, 0.0)
        if self.normalize:
            self.live = self.denominator >= MIN_DENOMINATOR
            self.y = self._divide(self.y)

    def _divide(self, x):
        """x [n, V] over the denominator; 0 where that is too small."""
        safe = np.where(self.live, self.denominator, 1.0)
        return np.where(self.live[:, None], x / safe[:, None], 0.0)

    def output_grad(self, dy):
        """Gradients of sum(dy * y) with respect to the numerator [n, V] and the denominator [n]."""
        if not self.normalize:
            return dy, np.zeros(len(dy))
        dnumerator = self._divide(dy)
        return dnumerator, -(dnumerator * self.y).sum(axis=1)


def _weights(inp, x, log):
    """w = score(x) exp(log) and dw/dx; for a normalized exp both over the row's largest weight, which cancels."""
    if inp.score == "exp":
        logits = x + log  # one exponent: e^x alone could overflow where the decay makes the weight small
        weight = np.exp(logits - logits.max(axis=1, keepdims=True)) if inp.normalize else np.exp(logits)
        return weight, weight
    decay = np.exp(log)
    return (x * decay, decay) if inp.score == "linear" else (x**2 * decay, 2 * x * decay)


def _final_sums(inp):
    """(kv, key_sum) after each row's last valid token."""
    kv, key_sum = (x.copy() for x in inp.sums)
    for group in inp.each_group():
        at, carry = (group.b, group.g), np.exp(group.carry)
        phi = np.exp(group.to_end)[:, None] * _features(inp.score, group.k)
        kv[at] = carry * kv[at] + phi.T @ group.v
        key_sum[at] = carry * key_sum[at] + phi.sum(axis=0)
    return kv, key_sum


def _final_cache(inp):
    """The exp state after each row's last valid token."""
    keys, values, log_decay, start, old = (x.copy() for x in inp.cache)
    length, capacity = old + inp.lengths, keys.shape[2]
    if (length > capacity).any():
        raise ValueError(f"the state holds {capacity} tokens and would need {length.max()}")
    for group in inp.each_group():
        b, g, n = group.b, group.g, group.n
        new, segment = slice(old[b], length[b]), inp.segment[b, :n]
        keys[b, g, new], values[b, g, new], log_decay[b, g, new] = group.k, group.v, inp.decay[b, :n, g]
        if segment[-1] > 0:
            start[b] = old[b] + np.flatnonzero(segment == segment[-1])[0]
    return {"keys": keys, "values": values, "log_decay": log_decay, "start": start, "length": length}


def forward(
    q, k, v, log_decay=None, *, score, normalize, scale=None, segment_ids=None, lengths=None, initial_state=None
):
    """(y [B, T, H, V], final state): a tuple (kv, key_sum), or for exp a dict."""
    options = {"scale": scale, "segment_ids": segment_ids, "lengths": lengths, "initial_state": initial_state}
    inp = _Inputs(q, k, v, log_decay, score=score, normalize=normalize, **options)
    y = np.zeros((*inp.q.shape[:3], inp.vdim))
    for group in inp.each_group():
        for h in group.heads:
            y[group.b, : group.n, h] = _Head(inp, group, h).y
    return y, _final_cache(inp) if score == "exp" else _final_sums(inp)


def gradients(dy, dstate, q, k, v, log_decay=None, **options):
    """Gradients of sum(dy * y) + sum(dstate * final state) by name; dstate is for the finite scores, or None.

    options are the keywords of forward.
    """
    inp = _Inputs(q, k, v, log_decay, **options)
    dy, dstate = _f64(dy), None if dstate is None else (_f64(dstate[0]), _f64(dstate[1]))
    out = {"q": np.zeros(inp.q.shape), "k": np.zeros(inp.k.shape), "v": np.zeros(inp.v.shape)}
    if inp.has_state:
        names = ("keys", "values", "log_decay") if inp.score == "exp" else ("kv", "key_sum")
        state = inp.cache if inp.score == "exp" else inp.sums
        out |= {f"initial_{name}": np.zeros(x.shape) for name, x in zip(names, state, strict=False)}
        if dstate is not None:  # a row without a valid token hands its state on as it is
            empty = inp.lengths == 0
            out["initial_kv"][empty], out["initial_key_sum"][empty] = dstate[0][empty], dstate[1][empty]
    ddecay = np.zeros(inp.decay.shape)
    for group in inp.each_group():
        _group_gradients(inp, group, dy, dstate, out, ddecay)
    if log_decay is not None:
        out["log_decay"] = np.where(inp.clamped, 0.0, ddecay)
    if inp.score == "exp" and inp.has_state and options["initial_state"]["log_decay"] is None:
        del out["initial_log_decay"]
    return out


def _group_gradients(inp, group, dy, dstate, out, ddecay):
    """Write one group's gradients into out and ddecay."""
    at, b, g, n, m = (group.b, group.g), group.b, group.g, group.n, len(group.slots)
    dkeys, dvalues, dlog = np.zeros(group.keys.shape), np.zeros(group.values.shape), np.zeros(group.log.shape)
    dprefix = np.zeros(n)
    for h in group.heads:
        head = _Head(inp, group, h)
        dnumerator, ddenominator = head.output_grad(dy[b, :n, h])
        dweight = dnumerator @ group.values.T + ddenominator[:, None]
        dx = inp.scale * dweight * head.slope
        dq = dx @ group.keys
        dkeys += dx.T @ head.q
        dvalues += head.weight.T @ dnumerator
        dlog += dweight * head.weight
        if group.sums is not None:
            kv, key_sum = group.sums
            dsum = np.where(head.carried_sum >= 0, ddenominator, 0.0)  # 0 itself is not clamped: a zero state learns
            dphi = head.coefficient * (dnumerator @ kv.T + dsum[:, None] * key_sum)
            dq += _features_grad(inp.score, head.q, dphi)
            dprefix += (dnumerator * head.carried).sum(axis=1) + dsum * head.carried_sum
            out["initial_kv"][at] += head.phi.T @ dnumerator
            out["initial_key_sum"][at] += head.phi.T @ dsum
        out["q"][b, :n, h] = dq
    if inp.score == "exp" and inp.has_state:
        dprefix += dlog[:, :m].sum(axis=1)
        out["initial_keys"][b, g, group.slots], out["initial_values"][b, g, group.slots] = dkeys[:m], dvalues[:m]
        before = np.cumsum(dlog[:, :m].sum(axis=0)) - dlog[:, :m].sum(axis=0)  # a token's decay is that of those before
        out["initial_log_decay"][b, g, group.slots] = before
    dkeys, dvalues, dlog = dkeys[m:], dvalues[m:], dlog[:, m:]
    if dstate is not None:
        dkv, dkey_sum = dstate[0][at], dstate[1][at]
        weight, phi = np.exp(group.to_end)[:, None], _features(inp.score, group.k)
        dphi = weight * (group.v @ dkv.T + dkey_sum)
        dkeys += _features_grad(inp.score, group.k, dphi)
        dvalues += weight * phi @ dkv
        dlog[-1] += (dphi * phi).sum(axis=1)
        if group.sums is not None:
            carry = np.exp(group.carry)
            dprefix[-1] += carry * ((group.sums[0] * dkv).sum() + (group.sums[1] * dkey_sum).sum())
            out["initial_kv"][at] += carry * dkv
            out["initial_key_sum"][at] += carry * dkey_sum
    out["k"][b, :n, g], out["v"][b, :n, g] = dkeys, dvalues
    # a_t is in D_ij for j < t <= i and in P_i for t <= i: add up the rows from t on, then the columns before t.
    from_t = np.cumsum(dlog[::-1], axis=0)[::-1]
    ddecay[b, :n, g] = np.tril(from_t, -1).sum(axis=1) + np.cumsum(dprefix[::-1])[::-1]


def kappa(q, k, log_decay=None, *, segment_ids=None, lengths=None):
    """Condition number [B, T, H] of the squared score's chunked form; inf where its denominator is 0 (padding too)."""
    inp = _Inputs(q, k, k, log_decay, score="squared", normalize=False, segment_ids=segment_ids, lengths=lengths)
    out = np.full(inp.q.shape[:3], np.inf)
    for group in inp.each_group():
        decay = np.exp(group.log)
        for h in group.heads:
            x = inp.q[group.b, : group.n, h]
            largest = (x**2).sum(axis=1) * (decay @ (group.k**2).sum(axis=1))
            actual = (decay * (x @ group.k.T) ** 2).sum(axis=1)
            np.divide(largest, actual, out=out[group.b, : group.n, h], where=actual != 0)
    return out
