"""Files of the hub and at URLs: which are chosen, that downloads resume, and what errors say."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from jaxgpt import data
from jaxgpt.data import remote
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import TokenizerConfig, build
from tests.fake_hub import COMMIT, OLD, running_hub

BYTES = build(TokenizerConfig(kind="bytes"), [])
server = pytest.fixture(running_hub)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "cache")


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds of the waits between tries, none of which is waited for."""
    seconds = []
    monkeypatch.setattr(remote, "wait", seconds.append)
    return seconds


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(folder, *texts):
    table = pyarrow.table({"text": list(texts), "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, folder / "made.parquet")
    return (folder / "made.parquet").read_bytes()


def names(path):
    return [file.name for file in remote.list_files(path)]


def contents(path):
    return [file.read_bytes() for file in remote.fetch(path)]


def refused(*paths, **options):
    with pytest.raises(InputError) as caught:
        remote.fetch(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Which files


FILES = {
    "README.md": b"---",
    "data/train-00000-of-00002.parquet": b"1",
    "data/train-00001-of-00002.parquet": b"2",
    "data/validation-00000-of-00001.parquet": b"3",
    "extra/train.jsonl": b"4",
    ".hidden/train.parquet": b"5",
    "empty/train.parquet": b"",
}


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ("", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        ("#validation", ["data/validation-00000-of-00001.parquet"]),
        ("#data/*-00001-*", ["data/train-00001-of-00002.parquet"]),
        ("#**/train.jsonl", ["extra/train.jsonl"]),
        ("#extra/train.jsonl", ["extra/train.jsonl"]),
        ("/data#validation", ["data/validation-00000-of-00001.parquet"]),
    ],
)
def test_splits_are_found_by_the_names_of_files(server, cache, selection, chosen):
    server.add("me/mine", FILES)
    assert names(f"hf:me/mine{selection}") == [f"hf:me/mine/{name}" for name in chosen]


def test_the_card_of_a_data_set_names_its_configs_and_splits(server):
    files = ["en/c4-train.0.json.gz", "en/c4-validation.0.json.gz", "de/c4-train.0.json.gz"]
    server.add("me/c4", dict.fromkeys(files, b"x"))
    server.configs["me/c4"] = [
        {
            "config_name": "en",
            "data_files": [
                {"split": "train", "path": "en/c4-train.*.json.gz"},
                {"split": "validation", "path": ["en/c4-validation.*.json.gz"]},
            ],
        },
        {"config_name": "de", "data_dir": "de"},
        {"config_name": "all", "data_files": "**/*.gz"},
    ]
    assert names("hf:me/c4/en") == ["hf:me/c4/en/c4-train.0.json.gz"]
    assert names("hf:me/c4/en#validation") == ["hf:me/c4/en/c4-validation.0.json.gz"]
    assert names("hf:me/c4/de") == ["hf:me/c4/de/c4-train.0.json.gz"]
    assert len(names("hf:me/c4/all")) == 3
    assert "configs are all, de, en; use, for example, hf:me/c4/en" in refused("hf:me/c4")
    assert "no config 'fr'; its configs are all, de, en" in refused("hf:me/c4/fr")
    assert "has no split 'test'; its splits are train, validation" in refused("hf:me/c4/en#test")
    server.configs["me/c4"][1]["default"] = True
    server.main = "c" * 40
    server.add("me/c4", dict.fromkeys(files, b"x"), server.main)
    assert names("hf:me/c4") == ["hf:me/c4/de/c4-train.0.json.gz"]


def test_names_that_do_not_exist_list_what_there_is(server):
    server.add("me/mine", FILES)
    assert "/datasets/me/yours does not exist or is private" in refused("hf:me/yours")
    assert "has no revision 'v2'" in refused("hf:me/mine@v2")
    assert "splits are train, validation" in refused("hf:me/mine#test")
    assert "no config 'de'; its folders are data, extra" in refused("hf:me/mine/de")
    assert "matches data/*.csv; its files are data/train-00000" in refused("hf:me/mine#data/*.csv")
    server.add("me/images", {"train.png": b"x"})
    assert "its files are train.png" in refused("hf:me/images")


@pytest.mark.parametrize("path", ["hf:", "hf:a/b/c/d", "hf:a b", "hf:/x", "hf:a/b/", "hf:a/b@../c"])
def test_a_path_of_another_form_is_refused(path):
    assert "hf:OWNER/NAME" in refused(path) or "is invalid; use a branch" in refused(path)


def test_a_gated_data_set_says_how_to_get_access(server, cache, monkeypatch):
    server.add("me/mine", FILES)
    server.gated.add("me/mine")
    server.tokens.add("hf_good")
    message = refused("hf:me/mine")
    assert f"{server.endpoint}/datasets/me/mine is gated or private" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert contents("hf:me/mine") == [b"1", b"2"]


# Revisions


def test_a_pinned_revision_is_read_after_its_branch_has_moved(server):
    server.add("me/mine", {"train.jsonl": lines("old")})
    cfg = data.DataConfig(paths=("hf:me/mine", "hf:me/mine@main#train"))
    pinned, revisions = data.pin(cfg, {})
    assert revisions == {"me/mine@main": COMMIT}
    assert pinned.paths == (f"hf:me/mine@{COMMIT}#train",) * 2
    server.main = OLD
    server.add("me/mine", {"train.jsonl": lines("new")}, OLD)
    assert data.pin(cfg, revisions) == (pinned, revisions)
    assert data.pin(cfg, {})[1] == {"me/mine@main": OLD}
    assert contents(pinned.paths[0]) == [lines("old")]
    assert contents("hf:me/mine") == [lines("new")]


def test_all_paths_of_records_are_pinned(server):
    server.add("me/mine", {"train.jsonl": b"{}"})
    cfg = data.RecordsConfig(
        paths=("a.tsv",), val_paths=("hf:me/mine",), test_paths=("hf:me/mine",)
    )
    pinned, _ = data.pin(cfg, {})
    assert pinned == replace(
        cfg, val_paths=(f"hf:me/mine@{COMMIT}#train",), test_paths=(f"hf:me/mine@{COMMIT}#train",)
    )


@pytest.mark.parametrize("offline", [False, True])
def test_the_cache_works_without_network(server, cache, monkeypatch, capsys, offline):
    server.add("me/mine", {"train.jsonl": lines("text")})
    expected = contents("hf:me/mine")
    server.stop()
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert contents("hf:me/mine") == contents(f"hf:me/mine@{COMMIT}") == expected
    assert ("did not answer" in capsys.readouterr().err) != offline
    assert "hf download me/other --repo-type dataset" in refused("hf:me/other")


def test_a_commit_whose_files_are_known_is_not_asked_for(server):
    server.add("me/mine", {"train.jsonl": lines("text")})
    remote.fetch("hf:me/mine")
    server.asked.clear()
    remote.fetch(f"hf:me/mine@{COMMIT}")
    assert server.asked == []


# Downloads


def test_a_cut_download_goes_on_where_it_was_cut(server, cache, monkeypatch, waits):
    monkeypatch.setattr(remote, "BLOCK", 1000)
    content = bytes(range(256)) * 10
    server.add("me/mine", {"train.jsonl": content})
    server.cut["train.jsonl"] = 300
    assert contents("hf:me/mine") == [content]
    blocks = ["bytes=0-999", "bytes=0-999", "bytes=1000-1999", "bytes=2000-2559"]
    assert server.ranges == blocks
    assert waits == [1.0]


def test_a_killed_download_goes_on_where_it_ended(server, cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1000)
    content = bytes(range(256)) * 10
    server.add("me/mine", {"train.jsonl": content})

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote, "answer_within", calls_then(remote.answer_within, 2, die))
        with pytest.raises(KeyboardInterrupt):
            remote.fetch("hf:me/mine")
    server.ranges.clear()
    assert contents("hf:me/mine") == [content]
    assert server.ranges == ["bytes=2000-2559"]


def calls_then(function, count, last):
    """A function that is called `count` times, and then another one."""
    left = [function] * count
    return lambda *args: (left.pop() if left else last)(*args)


def test_a_download_ends_after_many_failures_in_a_row(server, cache, waits):
    server.add("me/mine", {"train.jsonl": lines("text")})
    (file,) = remote.list_files("hf:me/mine")
    server.status = 503
    with pytest.raises(InputError, match="answered with HTTP status 503, 9 times in a row; 0 of"):
        remote.download(file, Path(cache))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    server.status = None
    assert remote.download(file, Path(cache)).read_bytes() == lines("text")


@pytest.mark.parametrize("sent", [0, 3, 11])
def test_an_answer_of_another_length_is_not_written(sent, cache, waits):
    answers = [b"x" * sent, b"0123456789"]
    file = remote.RemoteFile(
        "https://x/a.txt", 10, "", lambda start, end: answers.pop(0), lambda error: None
    )
    assert remote.download(file, Path(cache)).read_bytes() == b"0123456789"
    assert waits == [1]


def test_a_server_that_sends_no_parts_sends_the_whole(cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4)
    file = remote.RemoteFile(
        "https://x/a.txt", 10, "", lambda start, end: b"0123456789", lambda error: None
    )
    assert remote.download(file, Path(cache)).read_bytes() == b"0123456789"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_and_the_remedy(server, cache, monkeypatch, number):
    server.add("me/mine", {"train.jsonl": lines("text")})

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    message = refused("hf:me/mine")
    assert (
        f"the disk of {cache}/downloads has too little space for hf:me/mine/train.jsonl" in message
    )
    assert "data.cache" in message


def test_downloads_larger_than_the_budget_are_refused(server, cache):
    server.add("me/mine", {"train.jsonl": b"x" * 3000})
    message = refused("hf:me/mine", "", 1e-6)
    assert "more than data.disk_gb=1e-06; set data.stream=True" in message
    assert not list(Path(cache).glob("downloads/*train*"))


# URLs


def test_a_url_is_a_file_a_glob_or_a_folder(memory):
    for name in ("a.txt", "b.txt", "c.bin", "deep/d.jsonl"):
        memory.pipe(f"/books/{name}", name.encode())
    memory.pipe("/books/empty.txt", b"")
    assert contents("memory://books/a.txt") == [b"a.txt"]
    assert contents("memory://books/*.txt") == [b"a.txt", b"b.txt"]
    assert contents("memory://books") == [b"a.txt", b"b.txt", b"deep/d.jsonl"]


def test_a_file_url_is_read_from_the_local_disk(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert contents(f"file://{tmp_path}/*.txt") == [b"text"]


def test_a_web_server_is_read(server, cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 5)
    server.add("me/mine", {"a.txt": b"some text"})
    url = f"{server.endpoint}/me/mine/resolve/main/a.txt"
    (path,) = remote.fetch(f"{url}?download=true")
    assert (path.name, path.read_bytes()) == ("a.txt", b"some text")
    assert "none.txt does not exist" in refused(url.replace("a.txt", "none.txt"))


def test_a_changed_object_is_another_file(memory):
    memory.pipe("/a.txt", b"old")
    (old,) = remote.list_files("memory://a.txt")
    assert contents("memory://a.txt") == [b"old"]
    memory.pipe("/a.txt", b"new")
    (new,) = remote.list_files("memory://a.txt")
    assert old.key != new.key
    assert contents("memory://a.txt") == [b"new"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://none.txt", "does not exist"),
        ("memory://*.txt", "no file matches memory://"),
        ("memory://folder", "has no file with a suffix of .parquet"),
        ("memory://void/empty.txt", "is empty"),
        ("nothing://a", "Protocol not known"),
        ("http://127.0.0.1:9/a.txt", "did not answer"),
    ],
)
def test_a_url_that_cannot_be_read_says_why(memory, url, reason):
    memory.pipe("/folder/a.bin", b"x")
    memory.pipe("/void/empty.txt", b"")
    assert reason in refused(url)


@pytest.mark.parametrize(("url", "extra"), [("s3://b/a.txt", "s3"), ("gs://b/a.txt", "gcs")])
def test_a_missing_package_is_named(monkeypatch, url, extra):
    def missing(*_, **__):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert f"pip install 'jaxgpt[{extra}]'" in refused(url)


def test_refused_access_names_the_credentials(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    assert "is refused (Access Denied); set the credentials" in refused("s3://b/a.txt")


# As text and as records


def test_text_of_the_hub_is_that_of_local_files(server, cache, tmp_path):
    content = {
        "train-0.parquet": parquet(tmp_path, "one", "zwei ä"),
        "train-1.parquet": parquet(tmp_path, "three"),
    }
    server.add("me/mine", content)
    for name, values in content.items():
        (tmp_path / name).write_bytes(values)
    local = str(tmp_path / "train-*.parquet")
    corpora = [
        data.prepare(data.DataConfig(paths=(path,), val_fraction=0.0), BYTES)
        for path in ("hf:me/mine", local)
    ]
    assert corpora[0].train[:].tolist() == corpora[1].train[:].tolist()
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_records_of_the_hub_are_those_of_its_files(server):
    rows = [{"instruction": f"{n}?", "output": str(n)} for n in range(4)]
    halves = ["".join(json.dumps(row) + "\n" for row in half) for half in (rows[:2], rows[2:])]
    files = {f"train-{n}.jsonl": half.encode() for n, half in enumerate(halves)}
    server.add("me/mine", files)
    reader = data.Reader(fields=("instruction", "output"))
    cfg = data.RecordsConfig(paths=("hf:me/mine",), val_fraction=0.0)
    found = data.read_splits(cfg, reader)["train"]
    assert [record.values for record in found] == rows
    server.add("me/text", {"train.txt": b"text"})
    with pytest.raises(InputError, match="is not a file of records"):
        data.read_splits(replace(cfg, paths=("hf:me/text",)), reader)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.parquet", lines("text"), "is not Parquet, or is damaged"),
        ("train.jsonl", b"PAR1 and more", "is parquet, not text"),
        ("train.jsonl", b'{"text": 1}\n', "is int, not a string"),
        ("train.jsonl", b'{"a": "x", "b": "y"}\n', "has no column 'text'"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(server, cache, name, content, reason):
    server.add("me/mine", {name: content})
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        data.prepare(data.DataConfig(paths=("hf:me/mine",)), BYTES)
    assert name in str(caught.value)


def test_a_deleted_download_is_fetched_again(server, cache):
    server.add("me/mine", {"train.jsonl": lines("text")})
    remote.fetch("hf:me/mine")
    shutil.rmtree(cache)
    assert contents("hf:me/mine") == [lines("text")]


# A store with the S3 protocol


def test_text_in_a_bucket_is_read_whole_and_streamed(bucket, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 100)
    for n in range(3):
        bucket.pipe(f"books/deep/train-{n}.jsonl", lines(*(f"{n} text {m}" for m in range(20))))
    assert contents("s3://books/deep/*-1.jsonl") == [bucket.cat("books/deep/train-1.jsonl")]
    cfg = data.DataConfig(paths=("s3://books/deep/",), val_fraction=0.0, shuffle=False)
    shape = {"context": 8, "batch": 2}
    whole = data.prepare(cfg, BYTES).train[:9]
    streamed = data.stream(replace(cfg, stream=True), BYTES, **shape).batch(0)
    assert streamed["tokens"][0].tolist() == whole[:8].tolist()
    assert "does not exist" in refused("s3://books/none.txt")
    assert "no-such-bucket" in refused("s3://no-such-bucket/*.txt")
