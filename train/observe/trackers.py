"""Where the records of a run go: metrics.jsonl always, TensorBoard and Weights & Biases where they are asked for."""

import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from train.errors import UserError, import_extra, one_line
from train.observe.metrics import MetricsWriter
from train.workdir import replace, writing

Record = dict[str, Any]


class Tracker(Protocol):
    """Takes records of metrics.jsonl, in order."""

    def write(self, record: Record) -> None:
        """Takes one."""
        ...

    def close(self) -> None:
        """Ends."""
        ...


def numbers(record: Record) -> dict[str, float]:
    """The figures of a record: neither its step nor what is unknown or not finite."""
    return {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}


class TensorBoard:
    """Event files in `workdir/tensorboard`."""

    def __init__(self, workdir: Path, resumed_step: int):
        """TensorBoard hides what was written after `resumed_step`. Raises UserError where the extra is missing."""
        module = import_extra("tensorboardX", "log")
        with writing(workdir):
            self._writer = module.SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: Record) -> None:
        """Writes one record."""
        for key, value in numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with: its id is in `workdir/wandb_id`."""

    def __init__(self, workdir: Path, project: str, config: ConfigDict):
        """Raises UserError where the extra is missing, or the service is not reached or lets nobody in."""
        wandb = import_extra("wandb", "log")
        path = workdir / "wandb_id"
        if not path.exists():
            replace(path, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=project,
                id=path.read_text(),
                resume="allow",
                name=workdir.name,
                dir=str(workdir),
                config=config.to_dict(),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases does not start ({one_line(error)}): `wandb login`, WANDB_MODE=offline, or "
                "--config.log.wandb=False"
            ) from error

    def write(self, record: Record) -> None:
        """Sends one record."""
        self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


def check_trackers(config: ConfigDict) -> None:
    """Raises UserError where a tracker of `config.log` is not installed."""
    for asked, module in ((config.log.tensorboard, "tensorboardX"), (config.log.wandb, "wandb")):
        if asked:
            import_extra(module, "log")


def open_trackers(config: ConfigDict, workdir: Path, resumed_step: int, stack: ExitStack) -> list[Tracker]:
    """The trackers of a run that goes on after `resumed_step`; `stack` closes them."""
    trackers: list[Tracker] = []

    def add(tracker: Tracker) -> None:
        trackers.append(tracker)
        stack.callback(tracker.close)

    add(MetricsWriter(workdir / "metrics.jsonl", resumed_step))
    if config.log.tensorboard:
        add(TensorBoard(workdir, resumed_step))
    if config.log.wandb:
        add(WeightsAndBiases(workdir, config.log.wandb_project, config))
    return trackers
