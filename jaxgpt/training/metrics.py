"""`metrics.jsonl`, the history of a run: one JSON object a line, safe from kills and full disks.

Lines are only ever appended. When a run resumes from a checkpoint, the records of later steps are
moved to `metrics.abandoned.jsonl`, so that the file is one history and nothing is lost.
"""

import contextlib
import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from jaxgpt.errors import TrainingError

logger = logging.getLogger(__name__)


class MetricsFile:
    """The open file of a run; records that cannot be written wait in memory and are tried again."""

    def __init__(self, path: Path, start: int) -> None:
        """Opens the file after the records of step `start`; later ones are moved away.

        Raises:
            TrainingError: It cannot be written.
        """
        self.path = path
        self.waiting: list[bytes] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: Any = path.open("r+b" if path.exists() else "x+b", buffering=0)
            content = self._file.read()
            self._size = _end_of_step(content, start)
            if abandoned := content[self._size :]:
                _append(path.with_suffix(".abandoned.jsonl"), abandoned)
                self._file.truncate(self._size)
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be written: {error.strerror}; make room, or set `runs` to another "
                "folder"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, whose numbers are finite; see `flush` for what it raises."""
        self.waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes the records that wait.

        Raises:
            TrainingError: They cannot be written; they wait for the next try.
        """
        while self.waiting:
            try:
                self._file.seek(self._size)
                line = self.waiting[0]
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)  # no half of a line
                raise TrainingError(
                    f"{len(self.waiting)} records cannot be written to {self.path}: "
                    f"{error.strerror}"
                ) from error
            self._size += len(line)
            del self.waiting[0]

    def close(self) -> None:
        """Closes the file; records that wait are lost."""
        self._file.close()


def mark_finished(path: Path, step: int) -> None:
    """Records that all that is done after the last step of a run was done."""
    file = MetricsFile(path, step)
    file.write({"step": step, "finished": step, "time": round(time.time(), 3)})
    file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; its last line may be incomplete after a kill.

    Any other line that is not a record is skipped with a warning.
    """
    for message in find_bad_lines(path):
        logger.warning("%s: %s and is skipped", path, message)
    return [record for line in _lines(path) if (record := _parse(line)) is not None]


def find_bad_lines(path: Path) -> list[str]:
    """Which lines, but an incomplete last one, are not records."""
    lines = _lines(path)
    return [
        f"line {number} is not a record"
        for number, line in enumerate(lines[:-1], 1)
        if _parse(line) is None
    ]


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").split("\n") if path.exists() else []


def _parse(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _end_of_step(content: bytes, start: int) -> int:
    """Where the records of later steps begin, or a last line that is incomplete."""
    end = position = 0
    for line in content.splitlines(keepends=True):
        position += len(line)
        record = _parse(line)
        step = None if record is None else record.get("step")
        if isinstance(step, int | float):
            if step > start or not start:
                return end
            if line.endswith(b"\n"):
                end = position
    return end


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content if content.endswith(b"\n") else content + b"\n")
        file.flush()
        os.fsync(file.fileno())
