"""Checkpoints by Orbax, each with a manifest of its own, so that a damaged one is found before it is read.

Orbax takes a directory without its commit marker for a checkpoint, casts silently to the dtypes asked for, and reads
some damaged files without complaint. `files.json`, written into a checkpoint when all else is on the disk, lists the
SHA-256 of every file and the shape and dtype of every array. A checkpoint counts only where the list holds.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.errors import UserError
from train.step import TrainState
from train.workdir import replace

MANIFEST = "files.json"


def describe_arrays(state: TrainState) -> dict[str, str]:
    """Path, dtype and shape of every array of a state, which may be abstract."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def describe_files(directory: Path) -> dict[str, str]:
    """Path and SHA-256 of every file below `directory`, the manifest itself left out."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def find_damage(directory: Path, arrays: dict[str, str]) -> str | None:
    """Why the checkpoint in `directory` cannot be restored into a state of these `arrays`; None where it can."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        saved_files, saved_arrays = dict(manifest["files"]), dict(manifest["arrays"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never completed"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    found = describe_files(directory)
    for name, digest in saved_files.items():
        if found.get(name) != digest:
            return f"{name} is {'damaged' if name in found else 'missing'}"
    for name in sorted(arrays.keys() | saved_arrays.keys()):
        saved, wanted = saved_arrays.get(name, "absent"), arrays.get(name, "absent")
        if saved != wanted:
            return f"{name} is {saved} there, but the model's is {wanted}"
    return None


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps that have a directory of their own, rising; what else lies in `directory` is none of ours."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


class Checkpoints:
    """The checkpoints of a run in `workdir/checkpoints`, the last `keep` of them."""

    def __init__(self, workdir: Path, keep: int):
        """Nothing is read or written yet."""
        self._directory = (workdir / "checkpoints").resolve()
        self._aside = workdir / "unreadable"
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def restore(self, abstract: TrainState, warn: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest readable state, with the shardings of `abstract`, and the data's position; None in a new run.

        Later ones that cannot be read are moved to `workdir/unreadable`, with a warning that names the step and the
        step that is used in its place. Raises UserError where there are checkpoints and none can be read.
        """
        arrays = describe_arrays(abstract)
        damaged: dict[int, str] = {}
        for step in reversed(checkpoint_steps(self._directory)):
            damage = find_damage(self._directory / str(step), arrays)
            if damage is None:
                self._set_aside(damaged, step, warn)
                restored = self._open().restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()),
                )
                return restored.state, restored.position
            damaged[step] = damage
        if damaged:
            reasons = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            raise UserError(
                f"no readable checkpoint in {self._directory} ({reasons}); move it away to start from the beginning"
            )
        return None

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Saves the state and the data's position under the state's step; on the disk when this returns."""
        step = int(state.step)
        self._open().save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)),
        )
        directory = self._directory / str(step)
        manifest = {"files": describe_files(directory), "arrays": describe_arrays(state)}
        replace(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def close(self) -> None:
        """Ends Orbax's threads."""
        if self._manager is not None:
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        # Opened late: the manager reads the directory once, so damaged checkpoints have to be out of it before.
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    def _set_aside(self, damaged: dict[int, str], fallback: int, warn: Callable[[str], None]) -> None:
        for step, damage in damaged.items():
            self._aside.mkdir(exist_ok=True)
            target, number = self._aside / str(step), 1
            while target.exists():
                number += 1
                target = self._aside / f"{step}-{number}"
            (self._directory / str(step)).rename(target)
            warn(
                f"the checkpoint of step {step} is unreadable ({damage}): moved to {target}, "
                f"falling back to step {fallback}"
            )
