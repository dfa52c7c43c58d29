"""When a run began, and where it went on: a line a session beside the metrics, which are the same without."""

import json
from datetime import UTC, datetime
from pathlib import Path

from cavelight.disk import clear_disk_errors


def note_session(path: Path, step: int, machine: str, peak: float) -> None:
    """Add a line to a run's sessions.jsonl.

    step: steps that are done already; machine: in words; peak: operations a second of its matrix products.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"step": step, "at": now, "machine": machine, "peak": peak})
    with clear_disk_errors(path), open(path, "a", encoding="utf-8") as handle:
        handle.write(line + "\n")
