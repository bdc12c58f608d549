import json
from pathlib import Path

import pytest

from jaxgpt.errors import TrainingError
from jaxgpt.training.metrics import MetricsFile, mark_finished, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, *steps, start=0):
    file = MetricsFile(path, start)
    for step in steps:
        file.write({"step": step})
    file.close()


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_resuming_moves_the_records_of_later_steps_away(path):
    write(path, 0, 1, 2, 3, 4)
    before = path.read_bytes()
    write(path, 3, start=2)
    assert steps_of(path) == [0, 1, 2, 3]
    assert path.read_bytes().startswith(before[: len('{"step": 0}\n') * 3])
    abandoned = path.with_name("metrics.abandoned.jsonl")
    assert steps_of(abandoned) == [3, 4]
    write(path, start=1)
    assert steps_of(abandoned) == [3, 4, 2, 3]  # it only grows


def test_starting_at_step_0_keeps_the_records_of_the_run_before(path):
    write(path, 0, 1)
    write(path, 0)
    assert steps_of(path) == [0]
    assert steps_of(path.with_name("metrics.abandoned.jsonl")) == [0, 1]


def test_an_incomplete_last_line_is_moved_away(path):
    write(path, 1, 2)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    write(path, 3, start=2)
    assert steps_of(path) == [1, 2, 3]
    assert path.with_name("metrics.abandoned.jsonl").read_bytes() == b'{"step": 3, "lo\n'


def test_a_line_that_is_not_a_record_is_skipped_with_a_warning_and_kept(path, caplog):
    write(path, 1)
    with path.open("ab") as file:
        file.write(b"\xff garbage\n[1]\n" + b'{"step": 2}\n')
    write(path, 3, start=2)
    assert steps_of(path) == [1, 2, 3]
    assert "line 2" in caplog.text and "line 3" in caplog.text
    assert b"garbage" in path.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_records_wait_while_the_disk_is_full_and_are_written_after(path):
    file = MetricsFile(path, 0)
    file.write({"step": 1})
    on_disk = file._file
    with Path("/dev/full").open("r+b", buffering=0) as file._file:
        for step in (2, 3):
            said = rf"{step - 1} records .*No space left on device"
            with pytest.raises(TrainingError, match=said):
                file.write({"step": step})
    file._file = on_disk
    file.write({"step": 4})
    file.close()
    assert steps_of(path) == [1, 2, 3, 4]


def test_a_failed_write_leaves_no_partial_line(path, monkeypatch):
    file = MetricsFile(path, 0)
    file.write({"step": 1})

    class Half:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def write(self, line):
            return self.inner.write(line[:5])

    whole, file._file = file._file, Half(file._file)
    with pytest.raises(TrainingError, match="No space left"):
        file.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n'
    file._file = whole
    file.flush()
    file.close()
    assert steps_of(path) == [1, 2]


def test_a_finished_run_is_marked(path):
    write(path, 1, 2)
    mark_finished(path, 2)
    assert steps_of(path) == [1, 2, 2]
    assert json.loads(path.read_text().splitlines()[-1])["finished"] == 2


def test_a_file_that_cannot_be_written_is_an_error(path):
    path.parent.touch()
    with pytest.raises(TrainingError, match="metrics.jsonl cannot be written: .*set `runs`"):
        MetricsFile(path, 0)
