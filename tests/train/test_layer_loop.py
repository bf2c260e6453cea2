"""Layers in a loop and one after the other: the same loss, gradients and checkpoints; the choice, and XLA's options."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE, exhaustive
from support.models import model_of, params_of

from train import loop as train_loop
from train.data.rows import abstract_batch
from train.layer_loop import CONCURRENT, LOOPED, UNROLLED, choose_layer_loop, compiler_options
from train.main import main
from train.observe.metrics import read_metrics
from train.sharding import make_mesh
from train.step import make_init, make_optimizer, make_train_step, weighted_sums

MESH = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


def mesh_of(platform, fsdp=1):
    """As much of a mesh of such devices as is looked at."""
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)] * fsdp, object), shape={"fsdp": fsdp})


@pytest.mark.parametrize(
    ("platform", "scan_layers", "chosen", "options"),
    [
        ("cpu", None, True, None),
        ("cpu", False, False, None),
        ("tpu", None, True, None),
        ("gpu", None, False, UNROLLED),
        ("gpu", False, False, UNROLLED),
        ("gpu", True, True, LOOPED),
    ],
)
def test_gpus_have_no_loop_unless_asked(platform, scan_layers, chosen, options):
    model = choose_layer_loop(model_of("2mamba", scan_layers=scan_layers), mesh_of(platform))
    assert model.execution.scan_layers is chosen
    assert compiler_options(model, mesh_of(platform)) == options


@pytest.mark.parametrize(("platform", "options"), [("gpu", UNROLLED | CONCURRENT), ("cpu", None)])
def test_kernels_may_run_at_the_same_time(platform, options):
    model = choose_layer_loop(model_of("2mamba", concurrent_kernels=True), mesh_of(platform))
    assert compiler_options(model, mesh_of(platform)) == options


def test_fsdp_has_a_loop_unless_asked_for_none():
    mesh = mesh_of("gpu", fsdp=2)
    model = choose_layer_loop(model_of("2mamba"), mesh)
    assert model.execution.scan_layers is True
    assert compiler_options(model, mesh) == LOOPED
    assert choose_layer_loop(model_of("2mamba", scan_layers=False), mesh).execution.scan_layers is False


PATTERN, LAYERS = ("softmax,2mamba*", 3) if EXHAUSTIVE else ("linear", 2)


@pytest.mark.parametrize("remat", ["none", "dots", "full"] if EXHAUSTIVE else ["dots"])
def test_loss_and_gradients_are_the_loop_s(remat):
    """Of a loop without remat. In float32, to 1e-6 of the largest gradient: sums may be in another order."""
    tokens = np.random.default_rng(0).integers(23, size=(2, 13))
    batch = {"tokens": tokens, "targets": tokens[:, ::-1], "segment_ids": tokens // 9, "weights": tokens % 3 / 13.0}
    found, params = [], params_of(model_of(PATTERN, LAYERS))
    for scan_layers in (True, False):
        model = model_of(PATTERN, LAYERS, remat="none" if scan_layers else remat, scan_layers=scan_layers)

        def loss(params, model=model):
            return weighted_sums(model, params, batch).loss

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    (loop, gradients), (value, others) = found
    assert float(value) == pytest.approx(float(loop), rel=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), others, gradients)


def test_the_state_is_the_loop_s():
    """What a checkpoint holds: the same arrays in the same places."""
    optimizer = make_optimizer(lambda _: 0.1, b1=0.9, b2=0.999, eps=1e-7, weight_decay=0.01, clip_norm=None)
    models = (model_of("softmax,linear*", 3, scan_layers=scan_layers) for scan_layers in (True, False))
    (_, loop), (_, others) = (make_init(model, optimizer, make_mesh(MESH)) for model in models)
    assert jax.tree.structure(others) == jax.tree.structure(loop)
    assert jax.tree.leaves(others) == jax.tree.leaves(loop)


@exhaustive("test_the_state_is_the_loop_s, and test_loss_and_gradients_are_the_loop_s")
def test_a_checkpoint_goes_on_with_or_without_a_loop(tiny, tmp_path, monkeypatch):
    """Four steps in a loop, four without and four in it again, against twelve in it. Samples are test_generate.py's."""
    monkeypatch.setattr(train_loop, "sample_text", lambda *_: "")
    options = {"model__num_layers": 2, "log_every": 1}
    for steps, scan_layers in ((4, True), (8, False), (12, True)):
        assert main(tiny(tmp_path / "moved", **options, steps=steps, execution__scan_layers=scan_layers)) == 0
    assert main(tiny(tmp_path / "whole", **options, execution__scan_layers=True)) == 0
    moved, whole = (
        [record["train/loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("moved", "whole")
    )
    assert len(moved) == 12
    assert moved == pytest.approx(whole, rel=1e-4)


def test_compiler_options_reach_the_compiler():
    """One that XLA does not know is refused when the step is compiled, and not before."""
    model, mesh = model_of("linear"), make_mesh(MESH)
    optimizer = make_optimizer(lambda _: 0.1, b1=0.9, b2=0.999, eps=1e-7, weight_decay=0.01, clip_norm=None)
    _, abstract = make_init(model, optimizer, mesh)
    batch = abstract_batch(2, 8)
    options = {"xla_no_such_option": True}
    step = make_train_step(model, optimizer, lambda _: 0.1, abstract, mesh, compiler_options=options)
    lowered = step.lower(abstract, batch)
    with pytest.raises(Exception, match="xla_no_such_option"):
        lowered.compile()
