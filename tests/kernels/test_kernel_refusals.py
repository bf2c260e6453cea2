"""What the kernels refuse and why, what is chosen in their place, and the table of tile sizes."""

import functools
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.kernel_cases import Case

from pallas_kernels import device
from pallas_kernels.chunked import problem
from pallas_kernels.interpreter import interpreted
from pallas_kernels.quadratic import tuning as tuning_module
from pallas_kernels.quadratic.tuning import Tiles, tuning
from twomamba_jax import decay_attention, decay_attention_step, init_state
from twomamba_jax.ops import dispatch

pytestmark = pytest.mark.quick

CALL = Case(tokens=9).call()  # a head dim of 64, two query heads to one of keys


def cast(dtype):
    return [x if x is None else x.astype(dtype) for x in (CALL.q, CALL.k, CALL.v)]


def narrow(q=64, v=64):
    return [CALL.q[..., :q], CALL.k[..., :q], CALL.v[..., :v]]


REFUSED = [
    (cast(jnp.float32), {}, "it takes bfloat16 q, k and v, got float32"),
    (cast(jnp.float16), {}, "it takes bfloat16 q, k and v, got float16"),
    (narrow(q=32, v=32), {}, "it has heads of 64 or 128, the larger of K and V, and this is 32"),
    (narrow(), {"precision": "highest"}, "precision='highest' needs products of float32"),
    (narrow(), {"form": "chunked", "score": "exp"}, "in chunks it has linear and squared scores only, got 'exp'"),
    (
        narrow(),
        {"form": "chunked", "chunk_size": 128},
        "its chunks have a multiple of 256 tokens for score='squared', got chunk_size=128",
    ),
    (
        narrow(),
        {"form": "chunked", "chunk_size": 192, "score": "linear"},
        "its chunks have a multiple of 128 tokens for score='linear', got chunk_size=192",
    ),
    (narrow(), {"form": "recurrent"}, "it has the parallel and the chunked form, and this is form='recurrent'"),
    (
        narrow(),
        {"initial_state": init_state("squared", 1, 1, 64, 64)},
        "it takes no initial_state in the parallel form",
    ),
]


def program_of(*arrays, **options):
    """What a call computes, as text; of functions in it not where they lie."""
    return re.sub(" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda *x: decay_attention(*x, **options))(*arrays)))


@pytest.mark.parametrize(("arrays", "options", "reason"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refuses_with_the_reason_and_none_takes_xla(arrays, options, reason):
    options = {"form": "parallel"} | options
    with interpreted():
        with pytest.raises(ValueError, match="implementation='mosaic_gpu' cannot compute this call: ") as error:
            decay_attention(*arrays, implementation="mosaic_gpu", **options)
        assert reason in str(error.value)
        chosen = program_of(*arrays, **options)
    assert chosen == program_of(*arrays, implementation="xla", **options)


def test_refuses_float64():
    with jax.enable_x64(True), interpreted():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in cast(jnp.float32)]
        with pytest.raises(ValueError, match="it takes bfloat16 q, k and v, got float64"):
            decay_attention(*wide, form="parallel", implementation="mosaic_gpu")


def test_refuses_heads_of_128_in_chunks_of_the_squared_score():
    arrays = [jnp.repeat(x, 2, axis=-1) for x in narrow()]
    with interpreted(), pytest.raises(ValueError, match="a head dim of 64 only for score='squared', got 128"):
        decay_attention(*arrays, form="chunked", implementation="mosaic_gpu")


def test_refuses_a_step():
    state = init_state("squared", 1, 1, 64, 64)
    token = (CALL.q[:, 0], CALL.k[:, 0], CALL.v[:, 0], None, state)
    with interpreted(), pytest.raises(ValueError, match="it has no form for a single token"):
        decay_attention_step(*token, score="squared", normalize=True, implementation="mosaic_gpu")


def test_refuses_tokens_that_are_sharded():
    mesh = AbstractMesh((1, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    arrays = [jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in narrow()]

    def shape(*axes):
        def attend(*arrays):
            options = {"form": "parallel", "implementation": "mosaic_gpu", "partition": PartitionSpec(*axes)}
            return decay_attention(*arrays, **options)

        return jax.eval_shape(attend, *arrays).shape

    with jax.sharding.use_abstract_mesh(mesh), interpreted():
        assert shape("sequence", "data") == arrays[0].shape  # tokens on the only device of an axis
        with pytest.raises(ValueError, match="one device in the parallel form, and 'sequence' shards them"):
            shape("data", "sequence")


@pytest.mark.parametrize(
    ("backend", "capability", "reason"),
    [
        ("cpu", None, "it needs a Hopper GPU, and the default backend is 'cpu'"),
        ("gpu", "8.0", r"it needs a Hopper GPU \(compute capability 9.0\), and NVIDIA A100 has 8.0"),
        ("gpu", "9.0", None),
    ],
)
def test_needs_a_hopper_gpu(monkeypatch, backend, capability, reason):
    found = types.SimpleNamespace(compute_capability=capability, device_kind="NVIDIA A100")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [found])
    if reason is None:
        assert device.unsupported_device() is None
        return
    with pytest.raises(ValueError, match=reason):
        decay_attention(*narrow(), implementation="mosaic_gpu")


def test_none_takes_the_kernels_where_it_can_and_says_so_once(caplog):
    dispatch._log_choice.cache_clear()
    with interpreted(), caplog.at_level(logging.INFO, logger="twomamba_jax"):
        for options in ({}, {}, {"score": "exp", "form": "chunked"}):
            jax.eval_shape(functools.partial(decay_attention, **options), *narrow())
    assert [record.message for record in caplog.records] == [
        "decay_attention: form=parallel, implementation=mosaic_gpu",
        "decay_attention: form=chunked, implementation=xla (mosaic_gpu: in chunks it has linear and squared scores "
        "only, got 'exp')",
    ]


TILES = {"own": 128, "streamed": 64, "num_stages": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own": 96}, "self.own=96"),
        ({"streamed": 96}, "self.streamed=96"),
        ({"own": 64, "streamed": 128}, "self.own=64 and self.streamed=128"),
        ({"own": 192, "streamed": 128}, "self.own=192 and self.streamed=128"),
        ({"num_stages": 1}, "self.num_stages=1 must be at least 2"),
        ({"part": 48}, "self.part=48"),
        ({"consumer_registers": 236}, "self.consumer_registers=236"),
        ({"producer_registers": 20}, "self.producer_registers=20"),
        # 168 registers for each of the 384 threads: 504 for a thread of every warpgroup.
        ({"consumer_registers": 240}, "at most 504 over all warpgroups; they come to 520"),
        ({"own": 192}, "at most 512 over all warpgroups; they come to 736"),
    ],
)
def test_tiles_that_no_kernel_can_have(changes, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**TILES | changes)


def test_tiles_that_fit():
    assert Tiles(**TILES).consumers == 2
    assert Tiles(**TILES | {"consumer_registers": 240, "producer_registers": 24}).consumers == 2
    assert Tiles(**TILES | {"own": 64}).consumers == 1


@pytest.mark.parametrize(
    ("kind", "tokens", "num_stages"),
    [
        ("NVIDIA H200", 1, 2),
        ("NVIDIA H200", 1024, 2),
        ("NVIDIA H200", 1025, 3),
        ("NVIDIA H200", 8192, 3),
        ("NVIDIA H200", 10**6, 3),
        ("NVIDIA H100 80GB HBM3", 1, 4),
        ("NVIDIA H100 80GB HBM3", 10**6, 4),
        ("NVIDIA GH200", 1025, 3),
    ],
)
def test_the_table_is_read_by_device_and_bucket(monkeypatch, kind, tokens, num_stages):
    """The smallest bucket that holds the tokens, or else the largest; an unknown device is taken for an H200."""
    buckets = {("NVIDIA H200", 1024): 2, ("NVIDIA H200", 8192): 3, ("NVIDIA H100 80GB HBM3", 512): 4}
    table = {
        (device, "squared", 64, bucket): tuple(TILES | {"num_stages": num_stages + i} for i in (0, 10, 20))
        for (device, bucket), num_stages in buckets.items()
    }
    other = {(device, "exp", 128, 64): (TILES | {"num_stages": 9},) * 3 for device, _ in buckets}
    monkeypatch.setattr(tuning_module, "TABLE", other | table)
    found = tuning(kind, "squared", 64, tokens)
    assert [x.num_stages - num_stages for x in (found.forward, found.queries, found.keys)] == [0, 10, 20]
    assert tuning(kind, "exp", 128, tokens).forward.num_stages == 9


@pytest.mark.parametrize(
    ("first", "packages", "library", "warns"),
    [
        (jax.__version_info__, ["nvidia-nvjitlink"], None, True),
        (jax.__version_info__, [], "libnvJitLink.so.13", True),
        (jax.__version_info__, ["nvidia-cublas"], None, False),
        ((99,), ["nvidia-nvjitlink"], None, False),
    ],
)
def test_warns_of_a_jax_whose_kernels_spill(monkeypatch, caplog, first, packages, library, warns):
    """Where they are chosen on a GPU."""
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch.hopper, "is_hopper", lambda: True)
    monkeypatch.setitem(dispatch.UNSUPPORTED_DEVICE, "mosaic_gpu", lambda: None)
    monkeypatch.setattr(dispatch, "SPILLING_JAX", first)
    monkeypatch.setattr(dispatch.importlib.metadata, "packages_distributions", lambda: {"nvidia": packages})
    monkeypatch.setattr(dispatch.ctypes.util, "find_library", lambda name: library)
    dispatch._log_choice.cache_clear()
    with caplog.at_level("WARNING", logger="twomamba_jax"):
        assert dispatch.choose_implementation(None, "parallel", lambda kernels: None) == "mosaic_gpu"
    dispatch._log_choice.cache_clear()
    assert ("compiles the kernels with spilled registers" in caplog.text) == warns


@pytest.mark.parametrize(("found", "count"), [({"core_count": 114}, 114), ({}, 132)])
def test_a_program_for_each_multiprocessor_of_the_device(monkeypatch, found, count):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**found)])
    assert device.multiprocessors() == count
    tiles = problem.Tiles()
    assert [tiles.programs_of(work) for work in (1000, 5)] == [count, 5]
