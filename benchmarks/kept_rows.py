"""Rows of a grid that are kept when they are done, OUT/rows/NAME.json, so that a grid that was killed goes on."""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import jax

from train.workdir import replace


def row_path(out: Path, name: str) -> Path:
    """The file that a row leaves when it is done."""
    return out / "rows" / f"{name}.json"


def keep_row(out: Path, name: str, found: dict[str, Any]) -> None:
    """Writes what is kept of a row, whole or not at all."""
    path = row_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(found, indent=1) + "\n")


def kept_row(out: Path, name: str) -> dict[str, Any] | None:
    """What is kept of a row; None where it is not done."""
    path = row_path(out, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def kept_rows(out: Path) -> list[dict[str, Any]]:
    """What is kept of all rows, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "rows").glob("*.json"))]


def origin(commit: str) -> dict[str, Any]:
    """What a row's figures were made by and on."""
    return {
        "commit": commit,
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }


def current_commit() -> str:
    """The commit of the code, with a mark where files differ from it."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def variant_in_name(variant: str) -> str:
    """A variant or a pattern of variants as part of a file's name."""
    return variant.replace(",", "+").replace("*", "x")
