import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from jaxgpt.errors import InputError, TrainingError
from jaxgpt.training.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from jaxgpt.training.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on the folder `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_rejected_with_the_name_of_the_first(tmp_path, holder):
    said = rf"run is being trained by process {holder.pid} on host {socket.gethostname()}; wait"
    with pytest.raises(InputError, match=said), RunLock(tmp_path / "run"):
        pass
    # The rejected process does not remove the running one's lock.
    with pytest.raises(InputError), RunLock(tmp_path / "run"):
        pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path / "run"):
        assert f'"pid": {os.getpid()}' in (tmp_path / "run" / "lock").read_text()


def test_a_folder_with_nothing_but_the_lock_is_removed_again(tmp_path):
    with RunLock(tmp_path / "runs" / "a"):
        pass
    assert not (tmp_path / "runs" / "a").exists()
    with RunLock(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "config.json").touch()
    with RunLock(tmp_path / "runs" / "a") as lock:
        lock.check()
    assert sorted(os.listdir(tmp_path / "runs" / "a")) == ["config.json", "lock"]


def test_a_file_system_without_locks_is_a_warning(tmp_path, capsys, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path / "run"):
        pass
    assert "file system without locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_rejected(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match="runs/a cannot be written"), RunLock(tmp_path / "runs/a"):
        pass


@pytest.mark.parametrize("put", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_that_disappears_or_is_replaced_is_noticed(tmp_path, put):
    with RunLock(tmp_path / "run") as lock:
        lock.check()
        (tmp_path / "run").rename(tmp_path / "away")
        put(tmp_path / "run")
        with pytest.raises(TrainingError, match="has disappeared or was replaced"):
            lock.check()
        if (tmp_path / "run").exists():
            (tmp_path / "run").rmdir()
        (tmp_path / "away").rename(tmp_path / "run")
        lock.check()
