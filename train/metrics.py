"""metrics.jsonl: one JSON object a line, each step once, also after a run was killed and resumed."""

import json
import math
from pathlib import Path
from typing import Any

from train.workdir import replace, writing


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the file, in order; a last line that was cut short is left out. No file, no records."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # A kill in the middle of a write leaves such a line, and none after it.
            break
    return records


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
