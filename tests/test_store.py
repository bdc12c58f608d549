"""Files in buckets and on mounts."""

import errno
import time
from pathlib import Path

import fsspec
import pytest

from jaxgpt import store as stores
from jaxgpt.errors import InputError
from jaxgpt.store import Store

PLACES = {"memory": "memory://bucket/a/", "folder": "a", "s3": "s3://books/a"}


@pytest.fixture(params=PLACES)
def store(request, tmp_path, monkeypatch):
    """An empty store of each kind."""
    monkeypatch.setattr(stores, "PAUSES", (0.0, 0.0))
    if request.param == "s3":
        request.getfixturevalue("bucket")
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
    monkeypatch.chdir(tmp_path)
    yield Store(PLACES[request.param])
    fsspec.filesystem("memory").store.clear()


def test_files_are_written_read_listed_copied_and_deleted(store, tmp_path):
    file = tmp_path / "file"
    assert store.files() == {}
    store.write("a.txt", b"12")
    store.write("a.txt", b"123")
    file.write_bytes(b"7" * 3_000_000)
    store.upload("deep/er/b.bin", file)
    store.copy("deep/er/b.bin", "other/b.bin")
    assert store.files() == {"a.txt": 3, "deep/er/b.bin": 3_000_000, "other/b.bin": 3_000_000}
    assert store.files("deep") == store.files("deep/er/") == {"deep/er/b.bin": 3_000_000}
    store.write("deep2/c", b"")
    assert store.files("deep") == {"deep/er/b.bin": 3_000_000}
    assert store.names() == ["a.txt", "deep", "deep2", "other"]
    store.remove(["deep2/c"])
    assert store.read("a.txt") == b"123"
    store.download("other/b.bin", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == file.read_bytes()
    store.remove(["deep/er/b.bin", "none", "a.txt"])
    assert store.files() == {"other/b.bin": 3_000_000}
    for ask in (store.read, lambda name: store.download(name, file)):
        with pytest.raises(FileNotFoundError):
            ask("none")


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_a_request_is_repeated(store, monkeypatch):
    write, failures = type(store._fs).pipe_file, [OSError("reset"), TimeoutError()]

    def failing(self, *args, **options):
        if failures:
            raise failures.pop()
        return write(self, *args, **options)

    monkeypatch.setattr(type(store._fs), "pipe_file", failing)
    store.write("a", b"1")
    assert store.read("a") == b"1"


def test_a_request_without_an_answer_ends(monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", ())
    monkeypatch.setattr(stores, "ANSWER_SECONDS", 0.1)
    store = Store("memory://bucket/a")
    monkeypatch.setattr(type(store._fs), "cat_file", lambda *_: time.sleep(3))
    with pytest.raises(InputError, match="did not answer \\(no answer for 1 seconds"):
        store.read("a")


def test_a_mount_that_disappears_is_not_made_again(tmp_path):
    store = Store(str(tmp_path / "drive" / "a"))
    store.write("a.txt", b"1")
    (tmp_path / "drive").rename(tmp_path / "away")
    with pytest.raises(InputError, match="cannot be written: it has disappeared; check that it is"):
        store.write("a.txt", b"2")
    assert not (tmp_path / "drive").exists()
    (tmp_path / "away").rename(tmp_path / "drive")
    store.write("a.txt", b"2")
    assert store.read("a.txt") == b"2"


def test_a_file_on_a_mount_is_replaced_as_a_whole(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("a.txt", b"old")

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="there is no space left to copy"):
        store.write("a.txt", b"new")
    assert store.read("a.txt") == b"old"
    assert store.files() == {"a.txt": 3}
