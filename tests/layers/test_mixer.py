"""The mixer against the paper's algorithms in NumPy, and what it starts from."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.traced import kept

from twomamba_jax import VARIANTS, Execution, Mixer
from twomamba_jax.layers.execution import DEAR

pytestmark = pytest.mark.quick

T, E, H, G, K = 9, 12, 4, 2, 6  # grouped heads: query head h reads key/value head h // 2


def project(p, name, x):
    """x [T, E] to heads [T, heads, K]; the Z projection alone has a bias."""
    return np.einsum("te,ehk->thk", x, p[name]["kernel"]) + p[name].get("bias", 0)


def convolve(p, name, x):
    """y_t = bias + sum_i w_i x_{t - (W - 1) + i}: the last tap is the current token."""
    kernel = p[f"conv_{name}_kernel"]
    y = np.zeros_like(x) + p.get(f"conv_{name}_bias", 0)
    for t in range(len(x)):
        for i, tap in enumerate(kernel):
            if t - (len(kernel) - 1) + i >= 0:
                y[t] += tap * x[t - (len(kernel) - 1) + i]
    return y


def rotate(x):
    """RoPE: the pair (2i, 2i + 1) as a complex number, turned by t theta^(-2i / K)."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, K, 2) / K)
    turned = pairs * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attend(q, k, v, score, log_decay=None, scale=K**-0.5, normalize=True):
    """y_i = sum_{j <= i} w_ij v_j, w_ij = score(scale <q_i, k_j>) exp(a_{j+1} + ... + a_i), row by row.

    Normalised by sum_j w_ij, a row without any weight is 0 (numerics contract, point 3).
    """
    groups = v.shape[1]
    a = np.zeros((len(q), groups)) if log_decay is None else log_decay
    y = np.zeros((len(q), H, K))
    for h in range(H):
        g = h // (H // groups)
        for i in range(len(q)):
            w = [score(scale * q[i, h] @ k[j, g]) * np.exp(a[j + 1 : i + 1, g].sum()) for j in range(i + 1)]
            y[i, h] = w @ v[: i + 1, g] / ((np.sum(w) or 1) if normalize else 1)
    return y


def output_norm(p, y, groups=1):
    """RMSNorm over all heads together, or over those of each group."""
    square = np.mean(y.reshape(len(y), groups, -1) ** 2, axis=2)
    return p["norm"]["scale"] * y / np.sqrt(np.repeat(square, H // groups, axis=1)[..., None] + 1e-5)


def output(p, y):
    return np.einsum("thk,hke->te", y, p["out"]["kernel"])


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def of_query_heads(x):
    return np.stack([x[:, h // (H // G)] for h in range(H)], axis=1)


def softmax(p, x):
    q, k, v = (project(p, name, x) for name in "qkv")
    return output(p, attend(rotate(q), rotate(k), v, np.exp))


def linear(p, x):
    q, k, v = (project(p, name, x) for name in "qkv")
    return output(p, attend(np.maximum(q, 0), np.maximum(k, 0), v, lambda s: s))


def mamba2(p, x):
    """Algorithms 2 and 3, whole."""
    q, k, v = (silu(convolve(p, name, project(p, name, x))) for name in "qkv")
    residual = p["D"] * of_query_heads(v)
    dt = softplus(x @ p["dt"]["kernel"] + p["dt_bias"])
    y = attend(q, k, v * dt[..., None], lambda s: s, -np.exp(p["A_log"]) * dt, scale=1, normalize=False)
    return output(p, output_norm(p, (y + residual) * silu(project(p, "z", x))))


def mamba2_released(p, x, norm_groups=1):
    """Mamba-2 with queries and keys that heads share, one D a head, and no bias of z."""
    q, k, v = (silu(convolve(p, name, project(p, name, x))) for name in "qkv")
    q, k = (np.repeat(y, H // y.shape[1], axis=1) for y in (q, k))
    dt = softplus(x @ p["dt"]["kernel"] + p["dt_bias"])
    y = attend(q, k, v * dt[..., None], lambda s: s, -np.exp(p["A_log"]) * dt, scale=1, normalize=False)
    assert "bias" not in p["z"]
    return output(p, output_norm(p, (y + p["D"][:, None] * v) * silu(project(p, "z", x)), norm_groups))


def mamba2s(p, x):
    """Algorithm 4."""
    q, k, v = (convolve(p, name, project(p, name, x)) for name in "qkv")
    dt = softplus(x @ p["dt"]["kernel"])
    decay = -softplus(x @ p["decay"]["kernel"])
    return output(p, output_norm(p, attend(q, k, v * dt[..., None], lambda s: s, decay, normalize=False)))


def two_mamba_long(p, x):
    """2Mamba with a bias in the decay."""
    return two_mamba(p, x, decay_bias=p["decay_bias"])


def two_mamba(p, x, score=np.square):
    """Algorithm 5, and with another score 2Mamba-E."""
    q, k, v = (convolve(p, name, project(p, name, x)) for name in "qkv")
    return output(p, attend(q, k, v, score, -softplus(x @ p["decay"]["kernel"])))


def two_mamba_dt_long(p, x, normalize_keys=False):
    """2Mamba with values times dt, and a bias in the decay."""
    q, k, v = (convolve(p, name, project(p, name, x)) for name in "qkv")
    v = v * softplus(x @ p["dt"]["kernel"])[..., None]
    if normalize_keys:
        k = k / np.sqrt(np.mean(k**2, axis=-1, keepdims=True) + 1e-5)
    log_decay = -softplus(x @ p["decay"]["kernel"] + p["decay_bias"])
    return output(p, attend(q, k, v, np.square, log_decay, scale=q.shape[-1] ** -0.5))


def conv3_silu(p, x):
    """A row of Table 1: the activation leaves the values alone."""
    q, k, v = (convolve(p, name, project(p, name, x)) for name in "qkv")
    return output(p, output_norm(p, attend(silu(q), silu(k), v, lambda s: s, normalize=False)))


def decay_original(p, x):
    """A row of Table 2: dt without a bias, and not on the values."""
    q, k, v = (project(p, name, x) for name in "qkv")
    decay = -np.exp(p["A_log"]) * softplus(x @ p["dt"]["kernel"])
    return output(p, output_norm(p, attend(q, k, v, lambda s: s, decay, normalize=False)))


ALGORITHMS = {
    "softmax": softmax,
    "linear": linear,
    "mamba2": mamba2,
    "mamba2s": mamba2s,
    "2mamba": two_mamba,
    "2mamba-e": functools.partial(two_mamba, score=np.exp),
    "2mamba-dt-long-k16": two_mamba_dt_long,
    "2mamba-dt-long-norm": functools.partial(two_mamba_dt_long, normalize_keys=True),
    "conv3-silu": conv3_silu,
    "decay-original": decay_original,
}


# Mamba-2 as it is released, and with what state-spaces' layer can be told besides.
RELEASED = VARIANTS["mamba2-released"].mixer
GROUPED = dataclasses.replace(RELEASED, qk_dim=5, qk_groups=2, norm_groups=2, conv_bias=False)
CASES = {
    **{name: (VARIANTS[name].mixer, G, algorithm) for name, algorithm in ALGORITHMS.items()},
    "mamba2-released": (RELEASED, None, mamba2_released),
    "mamba2-released, two groups": (GROUPED, None, functools.partial(mamba2_released, norm_groups=2)),
}


def mixer_of(name, **execution):
    return Mixer(VARIANTS[name].mixer, num_heads=H, head_dim=K, num_kv_heads=G, execution=Execution(**execution))


@pytest.mark.parametrize(("config", "kv_heads", "algorithm"), CASES.values(), ids=CASES)
def test_mixer_is_the_papers_algorithm(config, kv_heads, algorithm):
    """In float64, with parameters drawn anew so that none is at a neutral 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, T, E))
    with jax.enable_x64(True):
        execution = Execution(dtype=jnp.float64, param_dtype=jnp.float64)
        mixer = Mixer(config, num_heads=H, head_dim=K, num_kv_heads=kv_heads, execution=execution)
        shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x)["params"])
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 2, shapes)
        y, cache = jax.jit(mixer.apply)({"params": params}, x)
        y = np.asarray(y)
    assert y.dtype == np.float64
    assert cache is None
    expected = np.stack([algorithm(params, row) for row in x])
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_rotary_positions_count_by_their_differences():
    """All shifted is the same, all doubled is not."""
    mixer, x = mixer_of("softmax"), jax.random.normal(jax.random.key(0), (1, T, E))
    variables = jax.jit(mixer.init)(jax.random.key(1), x)
    positions = jnp.arange(T)[None]
    apply = jax.jit(lambda positions: mixer.apply(variables, x, positions=positions)[0])
    plain, shifted, doubled = (apply(p) for p in (None, positions + 5, 2 * positions))
    # Angles up to 14 are off by 14 epsilon, which their sine and the score inherit.
    np.testing.assert_allclose(shifted, plain, rtol=0, atol=14 * np.finfo(np.float32).eps * np.abs(plain).max())
    assert np.abs(doubled - plain).max() > 1e-3


@pytest.mark.parametrize(("variant", "kept_as"), [("softmax", "named"), ("softmax-conv2", "output")])
def test_rotated_queries_and_keys_are_kept_in_the_place_of_the_products(variant, kept_as):
    """By a rematerialised block, where nothing else needs the products: no rotation in the backward pass."""
    mixer, x = mixer_of(variant), jax.ShapeDtypeStruct((2, T, E), jnp.float32)
    variables = jax.eval_shape(mixer.init, jax.random.key(0), x)

    @functools.partial(jax.checkpoint, policy=DEAR)
    def loss(variables, x):
        return mixer.apply(variables, x)[0].sum()

    assert [line.split()[0] for line in kept((2, T, H, K), loss, variables, x)] == [kept_as]
    keys_and_values = kept((2, T, G, K), loss, variables, x)
    assert sorted(line.split()[0] for line in keys_and_values) == sorted([kept_as, "output"])  # values are not rotated


def test_memoryless_sees_the_convolutions_window_alone():
    """The output at t depends on the inputs t and t - 1, and its derivative by any other is exactly 0."""
    mixer, x = mixer_of("memoryless"), jax.random.normal(jax.random.key(0), (1, T, E))
    variables = jax.jit(mixer.init)(jax.random.key(1), x)
    jacobian = jax.jit(jax.jacrev(lambda x: mixer.apply(variables, x)[0].sum(-1)))(x)  # [1, T, 1, T, E]
    reach = np.abs(jacobian[0, :, 0]).max(axis=-1)
    within = np.eye(T, dtype=bool) | np.eye(T, k=-1, dtype=bool)
    np.testing.assert_array_equal(reach[~within], 0)
    assert (reach[within] > 1e-3).all()


@pytest.mark.parametrize(("heads", "half_lives"), [(1, [32]), (3, [1, 32, 1024])])
def test_half_lives_spread_from_the_first_head_to_the_last(heads, half_lives):
    """At a projection of 0, which is what a zero input has."""
    config, x = VARIANTS["2mamba-long"].mixer, jnp.zeros((1, 2, E))
    bias = jax.jit(Mixer(config, num_heads=heads, head_dim=K).init)(jax.random.key(0), x)["params"]["decay_bias"]
    decay_per_token = -softplus(np.float64(nn.unbox(bias)))
    np.testing.assert_allclose(np.exp(decay_per_token * half_lives), 0.5, rtol=1e-6)


def test_queries_and_keys_are_shared_between_heads_with_values():
    message = "qk_groups=2 shares queries and keys between heads that have values of their own, and num_kv_heads=2"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            Mixer(GROUPED, num_heads=H, head_dim=K, num_kv_heads=2).init, jax.random.key(0), jnp.zeros((1, 2, E))
        )


@pytest.mark.parametrize("name", ["mamba2", "mamba2-released", "2mamba-dt-long"])
def test_parameters_gradients_are_summed_in_float32(name):
    mixer = Mixer(VARIANTS[name].mixer, num_heads=H, head_dim=K, execution=Execution(dtype=jnp.bfloat16))
    x = jnp.zeros((2, 37, E), jnp.bfloat16)
    params = jax.eval_shape(lambda: nn.unbox(mixer.init(jax.random.key(0), x)["params"]))

    def loss(params):
        return mixer.apply({"params": params}, x)[0].astype(jnp.float32).sum()

    sums = re.findall(r":(\w+)\[([\d,]*)\] = reduce_sum", str(jax.make_jaxpr(jax.grad(loss))(params)))
    assert {dtype for dtype, shape in sums if "37" not in shape.split(",")} == {"f32"}


def test_initial_values():
    """Algorithm 2's for the decay; U(-1 / sqrt(fan in), 1 / sqrt(fan in)) for what projects and convolves."""
    width, heads = 16, 2048  # so many heads that draws come close to both ends of a range
    sizes, start = {"num_heads": heads, "head_dim": 1}, (jax.random.key(0), jnp.zeros((1, 2, width)))
    params, of_softplus = (
        jax.tree.map(np.asarray, nn.unbox(jax.jit(Mixer(VARIANTS[name].mixer, **sizes).init)(*start)["params"]))
        for name in ("mamba2", "2mamba")
    )
    decay = of_softplus["decay"]

    def spans(x, low, high):
        """All of x within, and from within half a percent of one end to within half a percent of the other."""
        margin = (high - low) / 200
        assert x.min() >= low
        assert x.max() <= high
        assert x.min() < low + margin
        assert x.max() > high - margin

    spans(np.exp(params["A_log"]), 1, 16 * (1 + 1e-6))
    spans(np.log(softplus(np.float64(params["dt_bias"]))), np.log(1e-3) - 1e-5, np.log(1e-1) + 1e-5)
    np.testing.assert_array_equal(params["D"], 1)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    bounds = {
        **{(name, "kernel"): width**-0.5 for name in ("q", "k", "v", "z", "dt")},
        ("z", "bias"): width**-0.5,
        ("out", "kernel"): heads**-0.5,
    }
    for (module, name), bound in bounds.items():
        spans(params[module][name], -bound, bound)
    spans(decay["kernel"], -(width**-0.5), width**-0.5)
    for name in "qkv":
        spans(params[f"conv_{name}_kernel"], -0.5, 0.5)  # a window of 4
        spans(params[f"conv_{name}_bias"], -0.5, 0.5)
    draws = [params[f"conv_{name}_kernel"][0, 0, 0] for name in "qkv"] + [params["q"]["kernel"][0, 0, 0]]
    assert len(set(map(float, draws))) == 4


def test_a_layer_of_a_stack_of_caches_is_not_written_alone():
    with pytest.raises(ValueError, match="pass writes=False"):
        mixer_of("2mamba").init(jax.random.key(0), np.zeros((1, 2, 16)), layer=jnp.int32(0))
