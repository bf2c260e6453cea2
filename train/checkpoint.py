"""Checkpoints by Orbax, written while the training goes on; the last ones and the best one are kept.

All processes of a run save and restore, into one directory that all of them see; what Orbax does not do is the first's.

Each has a manifest (train/manifest.py), written when all else is on the disk and can be read back; without it a
checkpoint does not count.
"""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from train.errors import UserError, one_line
from train.literal_path import LiteralPath
from train.manifest import (
    MANIFEST,
    PARAMETERS,
    describe_arrays,
    find_damage,
    holds_parameters_alone,
    read_held_out_loss,
    write_manifest,
)
from train.processes import on_first
from train.read_back import array_names, find_unreadable
from train.step import TrainState
from train.workdir import writing

Which = Literal["best", "latest"]

# Of parameters that are saved alone: what is compressed at once, and about how large a file becomes.
CHUNK_BYTES, FILE_BYTES = 2**24, 2**26


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps that have a directory of their own, rising; what else lies in `directory` is none of ours."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


def best_first(directory: Path) -> list[int]:
    """The steps by their held-out loss, the lowest first, those without one last; the later of equals first."""
    losses = {step: read_held_out_loss(directory / str(step)) for step in checkpoint_steps(directory)}
    return sorted(losses, key=lambda step: (math.inf if losses[step] is None else losses[step], -step))


def restore_params(workdir: Path, params: Any, which: Which, warn: Callable[[str], None]) -> tuple[Any, int]:
    """The parameters of the best or the latest readable checkpoint of a run, and its step; nothing is changed there.

    `params` is their tree as ShapeDtypeStructs, with shardings. A checkpoint that cannot be read is named to `warn`,
    and the next best or next latest is taken. Raises UserError where none can be read.
    """
    directory = (workdir / "checkpoints").resolve()
    steps = best_first(directory) if which == "best" else checkpoint_steps(directory)[::-1]
    if not steps:
        raise UserError(f"there is no checkpoint in {directory}")
    damaged: dict[int, str] = {}
    for step in steps:
        damage = _find_damage(directory / str(step), *_describe_params(params), PARAMETERS)
        if damage is None:
            return _read_params(directory / str(step), params), step
        warn(f"the checkpoint of step {step} is unreadable ({damage})")
        damaged[step] = damage
    raise UserError(f"no readable checkpoint in {directory} ({_listed(damaged)})")


def save_params(workdir: Path, params: Any) -> None:
    """Makes a checkpoint of step 0 that holds parameters alone: a training starts from them with a fresh optimiser.

    `params` are JAX arrays; what is in flight to the disk comes on top of them. Raises UserError where the disk
    refuses, or what was written cannot be read.
    """
    directory = (workdir / "checkpoints" / "0").resolve()
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with writing(workdir):
        directory.mkdir(parents=True)
        # At most one large array at a time, in chunks, and files that are not kept in memory until they are 2 GiB.
        handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1 + largest // 10**9)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                LiteralPath(directory / "state"),
                args=ocp.args.PyTreeSave(
                    {"params": params}, save_args={"params": options}, ocdbt_target_data_file_size=FILE_BYTES
                ),
            )
        arrays, names = _describe_params(params)
        damage = find_unreadable(directory / "state", names)
        if damage is not None:
            raise UserError(f"cannot save the parameters in {directory} (reading them back: {damage}): make room")
        write_manifest(directory, arrays, None)


def _describe_params(params: Any) -> tuple[dict[str, str], list[str]]:
    """The manifest's arrays of a checkpoint's parameters, and Orbax's names of them."""
    return describe_arrays(params, PARAMETERS), array_names({"params": params})


def _read_params(directory: Path, params: Any) -> Any:
    """The parameters of the checkpoint in `directory`, which is whole; `params` is their tree as ShapeDtypeStructs."""
    item = {"params": params}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            LiteralPath(directory / "state"),
            args=ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    return restored["params"]


def _find_damage(directory: Path, arrays: dict[str, str], names: list[str], prefix: str = "") -> str | None:
    """As `find_damage`, and whether the arrays `names` can be read. Raises UserError where a disk or a right fails."""
    try:
        return find_damage(directory, arrays, prefix) or find_unreadable(directory / "state", names)
    except OSError as error:  # What it holds may be whole, so no older one takes its place.
        raise UserError(
            f"cannot read the checkpoint in {directory} ({one_line(error)}): put that right, or move it away to go on "
            "from the one before"
        ) from error


def _listed(damaged: dict[int, str]) -> str:
    return "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())


class Checkpoints:
    """The checkpoints of a run in `workdir/checkpoints`: the last `keep` of them, and the best of those evaluated."""

    def __init__(self, workdir: Path, keep: int):
        """Nothing is read or written yet."""
        self._directory = (workdir / "checkpoints").resolve()
        self._aside = workdir / "unreadable"
        self._keep = keep
        # Directories made at once: otherwise an interrupt in the middle of a save leaves threads that wait 5 minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread = ThreadPoolExecutor(1, "seal")
        self._sealing: Future[None] | None = None
        self._step = 0  # of the checkpoint that is being written

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss of a checkpoint; infinite where none has one."""
        losses = (read_held_out_loss(self._directory / str(step)) for step in checkpoint_steps(self._directory))
        return min((loss for loss in losses if loss is not None), default=math.inf)

    def restore(
        self, abstract: TrainState, warn: Callable[[str], None], begin: Callable[[Any], TrainState] | None = None
    ) -> tuple[TrainState, dict[str, Any] | None] | None:
        """The latest readable state, with the shardings of `abstract`, and the data's position; None in a new run.

        Of a checkpoint that holds parameters alone (`save_params`) the state is `begin(params)`, and there is no
        position; without `begin` it does not count.

        Later ones that cannot be read are moved to `workdir/unreadable`, with a warning that names the step and the
        step that is used in its place; what a save that did not end left is removed. Raises UserError where there are
        checkpoints and none can be read.
        """
        step = on_first(lambda: self._find_latest(abstract, warn, begin is not None))
        if step is None:
            return None
        if begin is not None and holds_parameters_alone(self._directory / str(step)):
            return begin(_read_params(self._directory / str(step), abstract.params)), None
        restored = self._checkpointer.restore(
            LiteralPath(self._directory / str(step)),
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()),
        )
        return restored.state, restored.position

    def _find_latest(self, abstract: TrainState, warn: Callable[[str], None], begins: bool) -> int | None:
        """The step to restore, with the directory cleared up as `restore` says."""
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)  # not worth an end: it takes room and nothing else
        arrays, names = describe_arrays(abstract), array_names(abstract)
        damaged: dict[int, str] = {}
        for step in reversed(checkpoint_steps(self._directory)):
            if begins and holds_parameters_alone(self._directory / str(step)):
                damage = _find_damage(self._directory / str(step), *_describe_params(abstract.params), PARAMETERS)
            else:
                damage = _find_damage(self._directory / str(step), arrays, names)
            if damage is None:
                self._set_aside(damaged, step, warn)
                return step
            damaged[step] = damage
        if damaged:
            raise UserError(
                f"no readable checkpoint in {self._directory} ({_listed(damaged)}); move it away to start from the "
                "beginning"
            )
        return None

    def save(self, state: TrainState, position: dict[str, Any], held_out_loss: float | None = None) -> None:
        """Saves the state and the data's position under the state's step, with its held-out loss if it was measured.

        Waits for the save before, copies the state, and returns; the rest happens behind the training. Raises UserError
        where this or the save before fails (a full disk): what was saved earlier is whole.
        """
        self.wait()
        self._step = int(state.step)
        try:
            self._checkpointer.save(
                LiteralPath(self._directory / str(self._step)),
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)),
            )
        except Exception as error:  # As in `wait`.
            raise self._failure(error) from error
        described = describe_arrays(state), array_names(state)  # now: the state itself is the next step's
        self._sealing = self._thread.submit(self._seal, self._step, *described, held_out_loss)

    def wait(self) -> None:
        """Returns when the last save is on the disk. Raises UserError where it fails."""
        if self._sealing is None:
            return
        sealing, self._sealing = self._sealing, None
        try:
            sealing.result()
        except Exception as error:  # Orbax and TensorStore raise a full disk as many types.
            raise self._failure(error) from error

    def close(self) -> None:
        """Waits, and ends the threads. Raises UserError where the last save fails."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def _seal(self, step: int, arrays: dict[str, str], names: list[str], held_out_loss: float | None) -> None:
        """Completes the checkpoint of `step` when Orbax is done with it, then deletes those that are not kept.

        Raises UserError where the arrays `names` cannot be read back.
        """
        self._checkpointer.wait_until_finished()
        if jax.process_index() > 0:
            return
        damage = find_unreadable(self._directory / str(step) / "state", names)
        if damage is not None:
            raise UserError(f"reading it back: {damage}")
        write_manifest(self._directory / str(step), arrays, held_out_loss)
        steps = checkpoint_steps(self._directory)
        for old in set(steps[: -self._keep]) - set(best_first(self._directory)[:1]):
            # Without its manifest it does not count, so a kill in the middle of this leaves no half of one.
            (self._directory / str(old) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self._directory / str(old))

    def _failure(self, error: Exception) -> UserError:
        steps = [
            step for step in checkpoint_steps(self._directory) if (self._directory / str(step) / MANIFEST).exists()
        ]
        kept = f"the last whole one is that of step {steps[-1]}" if steps else "there is no earlier one"
        mend = "mend that" if isinstance(error, UserError) else "make room"
        return UserError(
            f"cannot save the checkpoint of step {self._step} in {self._directory} ({one_line(error)}): {kept}; "
            f"{mend}, and run again to resume"
        )

    def _set_aside(self, damaged: dict[int, str], fallback: int, warn: Callable[[str], None]) -> None:
        for step, damage in damaged.items():
            target, number = self._aside / str(step), 1
            while target.exists():
                number += 1
                target = self._aside / f"{step}-{number}"
            with writing(self._aside.parent):
                self._aside.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(target)
            warn(
                f"the checkpoint of step {step} is unreadable ({damage}): moved to {target}, "
                f"falling back to step {fallback}"
            )
