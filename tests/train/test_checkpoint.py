"""Checkpoints: what is saved comes back, and no damage goes unnoticed."""

import gc
import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exhaustive import EXHAUSTIVE

from train.checkpoint import Checkpoints, checkpoint_steps, restore_params
from train.errors import UserError
from train.literal_path import LiteralPath
from train.manifest import MANIFEST, describe_arrays, write_manifest
from train.step import TrainState


def make_state(step: int) -> TrainState:
    table = jax.random.normal(jax.random.key(step), (64, 50))
    return TrainState(
        jnp.int32(step), {"table": table}, ({"mu": table * 2}, jnp.int32(step)), jnp.int32(3), jnp.int32(0)
    )


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


def restore_from(workdir: Path, which: str, params=ABSTRACT.params):
    """The step that restore_params finds, its parameters checked, and the warnings."""
    warnings = []
    params, step = restore_params(workdir, params, which, warnings.append)
    assert np.array_equal(params["table"], make_state(step).params["table"])
    return step, warnings


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


KINDS = ["one byte short", "one bit changed", "removed", *(["emptied", "halved"] if EXHAUSTIVE else [])]


@pytest.mark.parametrize("kind", KINDS)
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


def save_all(workdir: Path, losses: dict[int, float | None], keep: int) -> None:
    checkpoints = Checkpoints(workdir, keep)
    for step, loss in losses.items():
        checkpoints.save(make_state(step), {"next_index": step}, loss)
    checkpoints.close()


def test_the_best_is_kept_beside_the_last(tmp_path):
    save_all(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 2.5}, keep=2)
    assert checkpoint_steps(tmp_path / "checkpoints") == [2, 5, 6]
    assert Checkpoints(tmp_path, 2).best_loss == 1.0
    save_all(tmp_path, {7: 0.5}, keep=2)
    assert checkpoint_steps(tmp_path / "checkpoints") == [6, 7]
    assert restore(tmp_path)[0][1] == {"next_index": 7}


def test_parameters_alone_come_from_the_best_or_the_latest_and_nothing_is_moved(tmp_path):
    save_all(tmp_path, {1: 1.0, 2: 0.5, 3: 2.0}, keep=3)
    assert restore_from(tmp_path, "best") == (2, [])
    assert restore_from(tmp_path, "latest") == (3, [])
    for step in (2, 3):
        (tmp_path / "checkpoints" / str(step) / "state/manifest.ocdbt").unlink()
    reason = "the checkpoint of step {} is unreadable (state/manifest.ocdbt is missing)"
    assert restore_from(tmp_path, "best") == (1, [reason.format(2)])
    assert restore_from(tmp_path, "latest") == (1, [reason.format(3), reason.format(2)])
    assert checkpoint_steps(tmp_path / "checkpoints") == [1, 2, 3]
    with pytest.raises(UserError, match="there is no checkpoint in"):
        restore_from(tmp_path / "none", "best")
    wrong = {"table": jax.ShapeDtypeStruct((3, 3), jnp.float32, sharding=ABSTRACT.params["table"].sharding)}
    with pytest.raises(
        UserError, match=r"no readable checkpoint .*step 1: .* is float32\[64, 50\] there, but the model's"
    ):
        restore_from(tmp_path, "best", wrong)


def test_a_save_goes_on_behind_and_holds_the_state_of_its_moment(tmp_path):
    """The state is donated to the next step at once, as in training: what is saved must be a copy."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=5)
    state = make_state(1)
    checkpoints.save(state, {"next_index": 1})
    for _ in range(20):
        state = step(state)
    checkpoints.close()
    assert_is(restore(tmp_path)[0], 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see test_train_faults.py
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    save_all(tmp_path, {1: None}, keep=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path, keep=3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        checkpoints.save(make_state(2), {"next_index": 2})
        with pytest.raises(
            UserError, match=r"cannot save the checkpoint of step 2 .*that of step 1; make room"
        ) as error:
            checkpoints.close()
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    restored, warnings = restore(tmp_path)
    assert_is(restored, 1)
    assert warnings == []
    assert checkpoint_steps(tmp_path / "checkpoints") == [1]


def test_what_a_save_that_did_not_end_left_is_removed(workdir):
    (workdir / "checkpoints/40.orbax-checkpoint-tmp/state").mkdir(parents=True)
    assert_is(restore(workdir)[0], 30)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["20", "30"]


def test_a_checkpoint_that_cannot_be_read_is_not_set_aside(workdir):
    """It may be whole: the run ends, and does not go on from an older one."""
    path = workdir / "checkpoints/30" / MANIFEST
    path.unlink()
    path.mkdir()  # as a file without the right to read it, which root would not notice
    with pytest.raises(UserError, match=r"cannot read the checkpoint in .*/30 \(.*Is a directory.*\): put that right"):
        restore(workdir)
    assert checkpoint_steps(workdir / "checkpoints") == [20, 30]


@pytest.mark.parametrize("name", ["exp[1]", "a**b"])
def test_a_path_of_pattern_characters_is_a_path(tmp_path, name):
    """Orbax finds what it saved by a glob, into which the path above would go as a pattern."""
    save_all(tmp_path / name, {1: None}, keep=1)
    restored, warnings = restore(tmp_path / name)
    assert_is(restored, 1)
    assert warnings == []
    assert restore_from(tmp_path / name, "latest") == (1, [])


def test_a_save_that_cannot_be_read_back_does_not_count(tmp_path, monkeypatch):
    save_all(tmp_path, {1: None}, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(LiteralPath, "glob", lambda *_: iter(()))
        with pytest.raises(
            UserError, match=r"save the checkpoint of step 2 .*reading it back: .*step 1; mend that, and run"
        ):
            save_all(tmp_path, {2: None}, keep=2)
    assert not (tmp_path / "checkpoints/2" / MANIFEST).exists()
    assert_is(restore(tmp_path)[0], 1)


def test_an_unreadable_save_with_a_whole_manifest_is_found(workdir):
    """As saves left them that were not read back."""
    directory = workdir / "checkpoints/30"
    (directory / "state/manifest.ocdbt").unlink()
    write_manifest(directory, describe_arrays(make_state(30)), None)
    assert restore_from(workdir, "latest")[0] == 20
    restored, (warning,) = restore(workdir)
    assert_is(restored, 20)
    assert "step 30 is unreadable (array step is missing, as are 5 others)" in warning
