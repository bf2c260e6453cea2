"""metrics.jsonl: one JSON object a line, each step once, also after a run was killed and resumed."""

import json
import math
from pathlib import Path
from typing import Any

from train.errors import UserError, one_line
from train.keys import LARGEST_COUNT
from train.workdir import replace, writing


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the file, in order; no file, no records. Raises UserError where it cannot be read.

    A line that is no record is left out, wherever it is: a kill cuts the last one short, a power cut leaves zeros, and
    somebody may have written to the file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    return [record for record in map(parse_record, lines) if record is not None]


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line, a JSON object whose step is the number of one; None where it is something else."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # The latter of brackets without end.
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step <= LARGEST_COUNT else None


def only_finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record with None for the figures that are not finite: JSON has no number for them."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}


class MetricsWriter:
    """Appends records to metrics.jsonl, behind those of the steps that the run is resumed after."""

    def __init__(self, path: Path, resumed_step: int):
        """Drops every record after `resumed_step`: the run makes those steps again."""
        self._path = path
        kept = [record for record in read_metrics(path) if record["step"] <= resumed_step]
        with writing(path.parent):
            replace(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it is with the operating system when this returns, so a kill does not lose it.

        Raises UserError where the disk is full.
        """
        with writing(self._path.parent):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
