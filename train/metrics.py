"""metrics.jsonl: one JSON object a line, each step once, also after a run was killed and resumed."""

import json
from pathlib import Path
from typing import Any

from train.workdir import replace


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


class MetricsWriter:
    """Appends records to metrics.jsonl, behind those of the steps that the run is resumed after."""

    def __init__(self, path: Path, resumed_step: int):
        """Drops every record after `resumed_step`: the run makes those steps again."""
        kept = [record for record in read_metrics(path) if record["step"] <= resumed_step]
        replace(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it is with the operating system when this returns, so a kill does not lose it."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
