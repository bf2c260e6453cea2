"""The working directory: where a run lives by default, and whether a directory belongs to this run.

A run resumes when its command is given again, so a directory must hold one run only. `config.json` is the run's
configuration and `corpus.json` the digest of its data; both are compared before anything else is read.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.configuration import flatten, to_json
from train.errors import UserError, one_line

# These leave the parameters after a given number of steps as they are (a mesh, microbatches, chunks, what is computed
# again, a loop over layers, kernels between products or at the same time change only the rounding), so a run may go on
# under other values: observing it more often, or on another number of devices, makes no other run of it.
FREE_ON_RESUME = (
    "log_every", "eval_every", "eval_rows", "checkpoint_every", "checkpoints_kept", "sample.", "mesh.",
    "distributed.", "data.cache_dir", "skip_limit", "log.", "profile.", "microbatches", "loss_chunk_size",
    "execution.remat", "execution.scan_layers", "execution.elementwise_kernels", "execution.concurrent_kernels",
)  # fmt: skip

# What an imported checkpoint says of the run that goes on from it: which parameters there are, and what they compute.
FIXED_BY_IMPORT = ("variant", "model.", "execution.param_dtype")

# Where the data is, not what it is: its digest is compared instead, so a run goes on where its data was moved to.
PLACES = ("data.root", "data.paths", "data.held_out_paths", "data.dataset", "data.tokenizer")


def free_on_resume(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a run may be resumed with another value of the dotted `key`; `config` is flat.

    `steps` is free where optimizer.decay_steps is given: then it only says where the run stops. Otherwise the
    learning rate ends at `steps`, and another value is another schedule.
    """
    if key == "steps":
        return config["optimizer.decay_steps"] is not None
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_ON_RESUME)


def default_workdir(config: ConfigDict, defaults: ConfigDict) -> Path:
    """`runs/NAME-SIZE`, with a hash of the overrides behind it where some override makes it another run.

    `defaults` is the configuration without overrides. The same command always gives the same directory.
    """
    flat, flat_defaults = flatten(config), flatten(defaults)
    changed = {
        key: value for key, value in flat.items() if value != flat_defaults[key] and not free_on_resume(key, flat)
    }
    name = f"{config.name}-{config.size}"
    if changed:
        name += "-" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / name


def claim(workdir: Path, config: ConfigDict, corpus: Mapping[str, Any]) -> None:
    """Writes config.json and corpus.json into a new `workdir`; in an old one, checks that they are this run's.

    A workdir that `train.convert import` made becomes this run's, if it has the same model and tokenizer.

    Raises UserError naming each key that differs with both of its values, or the two digests of the data or tokenizer.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is not a directory")
    mine = json.loads(to_json(config))
    for name in ("config.json", "corpus.json"):
        if (workdir / "checkpoints").exists() and not (workdir / name).exists():
            raise UserError(f"workdir {workdir} holds checkpoints but no {name}; choose another --workdir")
    if (workdir / "config.json").exists():
        theirs = _read(workdir / "config.json")
        flat_mine, flat_theirs = flatten(mine), flatten(theirs)
        imported = _is_imported(workdir)
        differing = [
            f"{key} is {flat_theirs.get(key, 'absent')!r} there and {flat_mine.get(key, 'absent')!r} here"
            for key in sorted(flat_mine.keys() | flat_theirs.keys())
            if _differ(key, flat_mine, flat_theirs)
            and not (key in PLACES or free_on_resume(key, flat_mine))
            and (not imported or key.startswith(FIXED_BY_IMPORT))
        ]
        if differing:
            raise UserError(f"workdir {workdir} holds another run: {'; '.join(differing)}; choose another --workdir")
    if (workdir / "corpus.json").exists():
        theirs = _read(workdir / "corpus.json")
        for key, other, thing in (("digest", "other", "data"), ("tokenizer", "another", "tokenizer")):
            if key not in theirs and "imported" in theirs:
                continue
            if theirs.get(key) != corpus.get(key):
                raise UserError(
                    f"workdir {workdir} was trained on {other} {thing}: its digest is {theirs.get(key)}, this "
                    f"{thing}'s is {corpus.get(key)}; bring that {thing} back, or choose another --workdir"
                )
        # Sizes of splits: another version may read other documents out of the same files.
        for key in sorted(theirs.keys() & corpus.keys()):
            if theirs[key] != corpus[key]:
                raise UserError(
                    f"workdir {workdir} was trained on the same files read in another way: its {key} is {theirs[key]}, "
                    f"now {corpus[key]}; choose another --workdir"
                )
    workdir.mkdir(parents=True, exist_ok=True)
    replace(workdir / "corpus.json", json.dumps(dict(corpus), indent=2, sort_keys=True) + "\n")
    replace(workdir / "config.json", to_json(config))


def _differ(key: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two flat configurations differ in a key. One that an older version did not have is off: None or False."""
    if key in mine and key in theirs:
        return mine[key] != theirs[key]
    value = mine[key] if key in mine else theirs[key]
    return value is not None and value is not False


def _is_imported(workdir: Path) -> bool:
    """Whether `train.convert import` made the workdir, and no run has taken it."""
    path = workdir / "corpus.json"
    return path.exists() and "imported" in _read(path)


@contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Makes a UserError of what the disk refuses inside: it is full, or read-only."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror or one_line(error)}") from error


def replace(path: Path, content: str | bytes) -> None:
    """Writes `content` so that a reader, or a run after a kill, finds the old or the new, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}); choose another --workdir") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; choose another --workdir")
    return content
