"""The list of what is in a checkpoint, by which a damaged one is found before it is read.

Orbax takes a directory without its commit marker for a checkpoint, casts silently to the dtypes asked for, and reads
some damaged files without complaint. `files.json`, written into a checkpoint when all else is on the disk, lists the
SHA-256 of every file and the dtype and shape of every array. A checkpoint counts only where the list holds.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from train.workdir import replace

MANIFEST = "files.json"
PARAMETERS = ".params"  # what the paths of a state's parameters start with


def describe_arrays(tree: Any, prefix: str = "") -> dict[str, str]:
    """Path (behind `prefix`), dtype and shape of every array of a tree, which may be abstract."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {prefix + jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def describe_files(directory: Path) -> dict[str, str]:
    """Path and SHA-256 of every file below `directory`, the manifest itself left out."""
    digests = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_manifest(directory: Path, arrays: dict[str, str], held_out_loss: float | None) -> None:
    """Completes the checkpoint in `directory`: all its files are on the disk."""
    manifest = {"files": describe_files(directory), "arrays": arrays, "held_out_loss": held_out_loss}
    replace(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_held_out_loss(directory: Path) -> float | None:
    """The held-out loss of the checkpoint; None where it was not measured, or the manifest cannot be read."""
    try:
        loss = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["held_out_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(loss) if isinstance(loss, float | int) else None


def holds_parameters_alone(directory: Path) -> bool:
    """Whether the checkpoint in `directory` has parameters and nothing else of a state; False where nothing says so."""
    try:
        arrays = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["arrays"]
        return bool(arrays) and all(name.startswith(PARAMETERS) for name in arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_damage(directory: Path, arrays: dict[str, str], prefix: str = "") -> str | None:
    """Why the arrays of the checkpoint whose paths start with `prefix` are not `arrays`, whole; None where they are."""
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
    saved_arrays = {name: saved for name, saved in saved_arrays.items() if name.startswith(prefix)}
    for name in sorted(arrays.keys() | saved_arrays.keys()):
        saved, wanted = saved_arrays.get(name, "absent"), arrays.get(name, "absent")
        if saved != wanted:
            return f"{name} is {saved} there, but the model's is {wanted}"
    return None
