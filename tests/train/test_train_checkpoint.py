"""Checkpoints: what is saved comes back, and no damage goes unnoticed."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import MANIFEST, Checkpoints, checkpoint_steps
from train.errors import UserError
from train.step import TrainState


def make_state(step: int) -> TrainState:
    table = jax.random.normal(jax.random.key(step), (64, 50))
    return TrainState(jnp.int32(step), {"table": table}, ({"mu": table * 2}, jnp.int32(step)))


ABSTRACT = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state(0)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(make_state(step), {"next_index": step})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def restore(workdir: Path, abstract: TrainState = ABSTRACT):
    warnings = []
    checkpoints = Checkpoints(workdir, keep=2)
    try:
        return checkpoints.restore(abstract, warnings.append), warnings
    finally:
        checkpoints.close()


def assert_is(restored, step: int) -> None:
    state, position = restored
    assert position == {"next_index": step}
    expected = make_state(step)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


def test_the_latest_comes_back_and_only_the_last_are_kept(workdir):
    assert checkpoint_steps(workdir / "checkpoints") == [20, 30]
    restored, warnings = restore(workdir)
    assert_is(restored, 30)
    assert warnings == []


def test_a_new_run_has_none(tmp_path):
    assert restore(tmp_path) == (None, [])


def damage_of(kind: str, content: bytes) -> bytes:
    middle = len(content) // 2
    return {
        "emptied": b"",
        "halved": content[:middle],
        "one byte short": content[:-1],
        "one bit changed": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
    }[kind]


@pytest.mark.parametrize("kind", ["emptied", "halved", "one byte short", "one bit changed", "removed"])
def test_damage_to_any_file_is_noticed(saved, tmp_path, kind):
    files = sorted(path.relative_to(saved) for path in (saved / "checkpoints/30").rglob("*") if path.is_file())
    assert len(files) > 8
    for number, name in enumerate(files):
        workdir = Path(shutil.copytree(saved, tmp_path / str(number)))
        path = workdir / name
        if kind == "removed":
            path.unlink()
        else:
            path.write_bytes(damage_of(kind, path.read_bytes()))
        restored, warnings = restore(workdir)
        if not warnings:  # Only where the damage left the manifest's meaning as it was.
            assert name.name == MANIFEST
            assert_is(restored, 30)
            continue
        assert_is(restored, 20)
        (warning,) = warnings
        assert "the checkpoint of step 30 is unreadable" in warning
        assert "falling back to step 20" in warning
        assert name.name in warning or name.name == MANIFEST  # a changed hash in it accuses the other file
        assert (workdir / "unreadable/30").is_dir()
        assert checkpoint_steps(workdir / "checkpoints") == [20]


def test_a_directory_that_was_never_completed_does_not_count(workdir):
    (workdir / "checkpoints/40").mkdir()
    (workdir / "checkpoints/note.txt").write_text("mine")
    restored, warnings = restore(workdir)
    assert_is(restored, 30)
    assert "step 40 is unreadable (files.json is missing, so it was never completed)" in warnings[0]


def test_saving_goes_on_after_falling_back(workdir):
    (workdir / "checkpoints/30" / MANIFEST).unlink()
    for _ in range(2):  # The second time there is an unreadable 30 already.
        checkpoints = Checkpoints(workdir, keep=2)
        warnings = []
        restored = checkpoints.restore(ABSTRACT, warnings.append)
        assert_is(restored, 20)
        assert len(warnings) == 1
        checkpoints.save(make_state(30), {"next_index": 30})
        checkpoints.close()
        assert_is(restore(workdir)[0], 30)
        (workdir / "checkpoints/30" / MANIFEST).unlink()
    assert sorted(path.name for path in (workdir / "unreadable").iterdir()) == ["30", "30-2"]


def test_other_dtypes_and_shapes_are_not_cast(workdir):
    for change in (
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
        lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 1), leaf.dtype, sharding=leaf.sharding),
    ):
        other = ABSTRACT._replace(params=jax.tree.map(change, ABSTRACT.params))
        with pytest.raises(
            UserError, match=r"step 30: \.params\['table'\] is float32\[64, 50\] there, but the model's"
        ):
            restore(workdir, other)


def test_where_none_is_readable_nothing_is_moved_and_every_step_is_named(workdir):
    (workdir / "checkpoints/20" / MANIFEST).write_text("{")
    (workdir / "checkpoints/30" / MANIFEST).write_text(json.dumps({"files": {"gone": "0"}, "arrays": {}}))
    with pytest.raises(UserError) as error:
        restore(workdir)
    assert "step 30: gone is missing; step 20: files.json is damaged" in str(error.value)
    assert checkpoint_steps(workdir / "checkpoints") == [20, 30]
    assert not (workdir / "unreadable").exists()
