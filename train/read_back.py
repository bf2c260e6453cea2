"""Whether what Orbax saved can be read: a save that left something out raises nothing.

Orbax writes the arrays of each process into a database of TensorStore's (OCDBT) and merges these into one. It is opened
and its keys are listed, which reads its tree of keys and none of the arrays.
"""

from pathlib import Path
from typing import Any

import jax
import tensorstore as ts

from train.errors import one_line


def array_names(tree: Any) -> list[str]:
    """The names under which Orbax saves the arrays of a tree, which may be abstract."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def find_unreadable(directory: Path, names: list[str]) -> str | None:
    """Why the arrays `names` cannot be read from the tree that was saved in `directory`; None where they can."""
    base = {"driver": "file", "path": f"{directory}/"}
    try:
        keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    except ValueError as error:
        return f"its arrays cannot be read: {one_line(error)}"
    found = {key.decode().rpartition("/")[0] for key in keys}
    missing = [name for name in names if name not in found]
    return f"array {missing[0]} is missing, as are {len(missing) - 1} others" if missing else None
