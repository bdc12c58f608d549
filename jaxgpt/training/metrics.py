"""`metrics.jsonl`, the history of a run: one JSON object per line.

Lines are only appended, so killed processes and full disks do no harm. When a run resumes from a
checkpoint, records of later steps are moved to `metrics.abandoned.jsonl`, so that the file is one
consistent history and no record is lost.
"""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from jaxgpt.errors import TrainingError

SAMPLES = "samples.jsonl"
"""The file in a run's folder with a sample of the model at every evaluation."""

logger = logging.getLogger(__name__)


class MetricsFile:
    """The open metrics file of a run; keeps records in memory until they can be written."""

    def __init__(self, path: Path, start: int) -> None:
        """Opens the file to append to it.

        Args:
            path: The file.
            start: The step from which the run resumes; records of later steps are moved away.

        Raises:
            TrainingError: The file cannot be written.
        """
        self.path = path
        self.waiting: list[bytes] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "x+b", buffering=0)
            content = self._file.read()
            self._size = _end_of_step(content, start)
            if abandoned := content[self._size :]:
                _append(path.with_suffix(".abandoned.jsonl"), abandoned)
                self._file.truncate(self._size)
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be written: {error.strerror}; free disk space, or set `runs` to "
                "another folder"
            ) from error

    def write(self, record: Mapping[str, object]) -> None:
        """Appends a record of finite numbers; raises TrainingError like `flush`."""
        self.waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes all pending records.

        Raises:
            TrainingError: They cannot be written, and stay pending until the next call.
        """
        while self.waiting:
            try:
                self._file.seek(self._size)
                line = self.waiting[0]
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)  # removes a partial line
                raise TrainingError(
                    f"{len(self.waiting)} records cannot be written to {self.path}: "
                    f"{error.strerror}"
                ) from error
            self._size += len(line)
            del self.waiting[0]

    def close(self) -> None:
        """Closes the file; pending records are lost."""
        self._file.close()


def mark_finished(path: Path, step: int) -> None:
    """Adds a record that the run is finished, including the work after its last step."""
    append_record(path, step, {"finished": step})


def append_record(path: Path, step: int, values: Mapping[str, object]) -> None:
    """Adds a record of a step to a file that is not open; records of later steps are moved away.

    Raises:
        TrainingError: The file cannot be written.
    """
    file = MetricsFile(path, step)
    try:
        file.write({"step": step, **values, "time": round(time.time(), 3)})
    finally:
        file.close()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Reads the records of a `metrics.jsonl`.

    The last line is ignored if it is incomplete, as after a kill. Any other line that is not a
    record is skipped with a warning.
    """
    records, messages = parse_metrics(path)
    for message in messages:
        logger.warning("%s: %s; skipped it", path, message)
    return records


def find_bad_lines(path: Path) -> list[str]:
    """Returns a message for each line that is not a record, except an incomplete last line."""
    return parse_metrics(path)[1]


def parse_metrics(path: Path) -> tuple[list[dict[str, object]], list[str]]:
    """Returns the records of a `metrics.jsonl`, and the messages of `find_bad_lines`."""
    lines, records, messages = _lines(path), [], []
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            messages.append(f"line {number} is not a record")
    return records, messages


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").split("\n") if path.exists() else []


def _parse(line: str | bytes) -> dict[str, object] | None:
    """Parses a record; returns None if the line is not a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _end_of_step(content: bytes, start: int) -> int:
    """The offset at which records after step `start`, or an incomplete last line, begin."""
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
