"""The cache of tokenized text: written once and atomically, and verified when opened."""

import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgpt import data, manifest
from jaxgpt.data import cache as cache_module
from jaxgpt.data import corpus as corpus_module
from jaxgpt.data import textfile, tokens
from jaxgpt.errors import InputError
from jaxgpt.tokenizer import TokenizerConfig, build

BYTES = build(TokenizerConfig(kind="bytes"), [])
EOT, V = BYTES.eot, BYTES.vocab_size
TEXT = "a bright cold day in April, and the clocks were striking thirteen; 42 änderte sich\n\n" * 30
FILES = ("SHA256SUMS", "index.json", "train-00000.bin", "train-00001.bin", "val-00000.bin")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return str(tmp_path / "a.txt")


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def entry(path, cache, monkeypatch):
    """A cache entry of several shards that was not verified since it was written."""
    monkeypatch.setattr(tokens, "SHARD", 1500)
    prepare(path, cache=cache)
    (entry,) = entries(cache)
    (entry / "verified.json").unlink()
    assert tuple(sorted(os.listdir(entry))) == FILES
    return entry


def prepare(*paths, tokenizer=BYTES, **options):
    return data.prepare(data.DataConfig(paths=paths, **options), tokenizer)


def entries(cache):
    """The complete entries of a cache."""
    folders = [entry for entry in Path(cache, "tokens").iterdir() if entry.is_dir()]
    return [folder for folder in folders if folder.suffix != ".partial"]


def read(entry):
    return {split: stream[:].tolist() for split, stream in tokens.read_tokens(entry, V).items()}


def flip_bit(file, position=0, keep_time=False):
    """Flips a bit and sets another modification time, as the clock may be too coarse."""
    state = os.stat(file)
    content = bytearray(file.read_bytes())
    content[position // 8 % len(content)] ^= 1 << position % 8
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + (0 if keep_time else 1)))


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are hashed while the test runs."""
    names, sha256 = [], manifest.file_sha256
    monkeypatch.setattr(
        manifest, "file_sha256", lambda file: names.append(file.name) or sha256(file)
    )
    return names


class Counting:
    """A tokenizer that counts the characters it encodes, and can call a function first."""

    def __init__(self, before=lambda encoded: None):
        self.encoded, self.before = 0, before

    def __getattr__(self, name):
        return getattr(BYTES, name)

    def encode_array(self, text):
        self.encoded += len(text)
        self.before(self.encoded)
        return BYTES.encode_array(text)


def break_after_500(encoded):
    if encoded > 500:
        raise RuntimeError("the tokenizer broke")


# Written once


def test_text_is_encoded_once(path, cache):
    first, second = Counting(), Counting()
    corpora = [prepare(path, tokenizer=each, cache=cache) for each in (first, second)]
    assert (first.encoded, second.encoded) == (len(TEXT), 0)
    np.testing.assert_array_equal(corpora[0].train[:], corpora[1].train[:])


def test_changed_content_is_encoded_anew(tmp_path, cache):
    file = tmp_path / "a.txt"
    file.write_text("content " * 20)
    prepare(str(file), cache=cache)
    stamp = os.stat(file)
    file.write_text("CONTENT " * 20)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    train = prepare(str(file), cache=cache, val_fraction=0.0).train
    assert train[1:].tobytes()[::2] == b"CONTENT " * 20


@pytest.mark.parametrize("change", [{"val_fraction": 0.2}, {"fields": ("text=body",)}])
def test_changed_rules_are_encoded_anew(tmp_path, cache, change):
    lines = [json.dumps({"text": f"text {n}", "body": f"body {n}"}) for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(str(tmp_path / "a.jsonl"), cache=cache)
    counting = Counting()
    prepare(str(tmp_path / "a.jsonl"), tokenizer=counting, cache=cache, **change)
    assert counting.encoded == len("text 0") * 9


def test_runs_at_the_same_time_encode_once(path, cache):
    counting, corpora = Counting(), []
    threads = [
        threading.Thread(
            target=lambda: corpora.append(prepare(path, tokenizer=counting, cache=cache))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(corpora) == 4
    assert counting.encoded == len(TEXT)


def test_bad_text_is_refused_before_anything_is_encoded(path, tmp_path, cache):
    (tmp_path / "b.txt").write_text(TEXT + "\0")
    counting = Counting()
    with pytest.raises(InputError, match="binary"):
        prepare(path, str(tmp_path / "b.txt"), tokenizer=counting, cache=cache)
    assert counting.encoded == 0


def test_text_that_changes_while_it_is_read_is_not_cached(path, cache, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 50)
    monkeypatch.setattr(textfile, "BLOCK", 100)

    def append(encoded):
        with open(path, "a") as file:
            file.write("more")

    with pytest.raises(InputError, match=r"a.txt changed while it was read"):
        prepare(path, tokenizer=Counting(append), cache=cache, workers=1)
    assert os.listdir(Path(cache, "tokens")) == ["lock"]


def test_the_entries_of_a_run_are_found_by_its_stored_fingerprint(path, tmp_path, cache):
    (tmp_path / "b.txt").write_text("to validate on")
    cfg = data.DataConfig(paths=(path,), val_paths=(str(tmp_path / "b.txt"),), cache=cache)
    stored = json.loads(json.dumps(data.prepare(cfg, BYTES).fingerprint))
    found = data.token_entries(cfg, stored)
    assert sorted(found) == sorted(entries(cache))
    assert [read(entry)["train"] for entry in found] == [
        [EOT, *TEXT.encode()],
        [EOT, *b"to validate on"],
    ]


# Verified when opened


def change(content, how, position):
    if how == "flip":
        changed = bytearray(content)
        changed[position // 8 % len(changed)] ^= 1 << position % 8
        return bytes(changed)
    if how == "truncate":
        return content[: position % len(content)]
    return content + b"\0"


def test_any_damage_is_found_and_named(entry):
    good = {name: (entry / name).read_bytes() for name in FILES}
    times = iter(range(10**18, 2 * 10**18))  # a clock may be too coarse to tell changes apart

    def write(name, content):
        (entry / name).write_bytes(content)
        os.utime(entry / name, ns=(0, next(times)))

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(FILES), st.sampled_from(["flip", "truncate", "append"]), st.integers(0))
    def check(name, how, position):
        changed = change(good[name], how, position)
        assume(changed + b"\n" != good[name])  # a list of hashes says the same without its last \n
        write(name, changed)
        damage = data.find_entry_damage(entry, V)
        assert damage
        with pytest.raises(InputError) as raised:
            tokens.read_tokens(entry, V)
        write(name, good[name])
        assert str(entry / damage[0]) in str(raised.value)
        assert f"--data.rebuild True to tokenize the text again, or delete the folder {entry}" in (
            str(raised.value)
        )
        # A damaged manifest can only be told from damaged files by those that it still lists.
        assert name == "SHA256SUMS" or all(line.startswith(name) for line in damage)

    expected = read(entry)
    check()
    assert data.find_entry_damage(entry, V) == []
    assert read(entry) == expected


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("remembered", [True, False])
def test_a_missing_file_is_found_and_named(entry, name, remembered):
    if remembered:
        tokens.read_tokens(entry, V)
    (entry / name).unlink()
    assert data.find_entry_damage(entry, V) == [f"{name}: missing"]
    with pytest.raises(InputError, match=rf"is damaged: {entry / name}: missing; use --data.reb"):
        tokens.read_tokens(entry, V)


@pytest.mark.parametrize("replaced", ["", *FILES])
def test_a_file_for_a_folder_or_a_folder_for_a_file_is_damage(entry, path, cache, replaced):
    if replaced:
        (entry / replaced).unlink()
        (entry / replaced).mkdir()
    else:
        shutil.rmtree(entry)
        entry.touch()
    (found,) = data.find_entry_damage(entry, V)
    assert found.startswith(replaced or "SHA256SUMS")
    with pytest.raises(InputError, match="--data.rebuild True"):
        prepare(path, cache=cache)
    assert len(prepare(path, cache=cache, rebuild=True).train)


def index(splits=None, train=None, **changes):
    """The index of the `entry` in these tests, with changes."""
    valid = {
        "train": {"shards": [1500, 796], "documents": 1, "bytes": 2295} | (train or {}),
        "val": {"shards": [256], "documents": 1, "bytes": 255},
    }
    return json.dumps({"dtype": "uint16", "eot": EOT, "splits": valid | (splits or {})} | changes)


def test_a_valid_index_is_not_damage(entry):
    (entry / "index.json").write_text(index())
    manifest.write_manifest(entry)
    assert data.find_entry_damage(entry, V) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        "\udcff",
        "[" * 100_000,
        "1" * 10_000,
        "{}",
        index(dtype="float32"),
        index(dtype="uint32"),
        index(dtype=["uint16"]),
        index(eot=None),
        index(eot=-1),
        index(splits={"train": None}),
        index(splits={"test": {"shards": [], "documents": 0, "bytes": 0}}),
        *(
            index(train=change)
            for change in (
                {"documents": "1"},
                {"bytes": 1.5},
                {"bytes": True},
                {"bytes": -1},
                {"shards": None},
                {"shards": "1500"},
                {"shards": {"1500": 1}},
                {"shards": [1500, "796"]},
                {"shards": [1500, 796.0]},
                {"shards": [1500, 0]},
                {"shards": [1500, -796]},
                {"shards": [1500, 797]},
                {"shards": [1500, 10**30]},
                {"shards": [1500] * 10_000},
            )
        ),
    ],
    ids=lambda content: content[:120],
)
def test_an_index_that_is_invalid_is_damage_even_with_a_matching_hash(entry, content):
    (entry / "index.json").write_bytes(content.encode(errors="surrogateescape"))
    manifest.write_manifest(entry)
    assert data.find_entry_damage(entry, V)
    with pytest.raises(InputError, match=r"tokenized text is damaged: .*delete the folder"):
        tokens.read_tokens(entry, V)


def test_an_empty_shard_is_damage_even_if_the_index_says_so(entry):
    (entry / "index.json").write_text(index(train={"shards": [1500, 0]}))
    (entry / "train-00001.bin").write_bytes(b"")
    manifest.write_manifest(entry)
    assert data.find_entry_damage(entry, V) == ["index.json: not a valid index of token shards"]


def test_a_manifest_that_lists_too_little_is_damage(entry):
    lines = (entry / "SHA256SUMS").read_text().splitlines(keepends=True)
    for kept in ([], lines[:1], lines[1:], lines[:-1]):
        (entry / "SHA256SUMS").write_text("".join(kept))
        assert data.find_entry_damage(entry, V) == [
            "SHA256SUMS: does not list the files of index.json"
        ]


def test_a_token_outside_the_vocabulary_is_damage_even_with_a_matching_hash(entry):
    shard = np.memmap(entry / "train-00001.bin", np.uint16, mode="r+")
    shard[7] = V
    shard.flush()
    manifest.write_manifest(entry)
    found = f"train-00001.bin: token id {V} is outside the vocabulary of {V}"
    assert data.find_entry_damage(entry, V) == [found]
    assert data.find_entry_damage(entry, None) == data.find_entry_damage(entry, V + 1) == []
    with pytest.raises(InputError, match=f"damaged: {entry / found}"):
        tokens.read_tokens(entry, V)


def test_shards_are_hashed_once_until_a_file_changes(entry, hashed):
    first = read(entry)
    assert set(hashed) == set(FILES) - {"SHA256SUMS"}
    hashed.clear()
    assert read(entry) == first
    assert set(hashed) == {"index.json"}  # a few bytes that determine how the rest is read
    hashed.clear()
    os.utime(entry / "val-00000.bin", ns=(0, 0))
    assert read(entry) == first
    assert set(hashed) == set(FILES) - {"SHA256SUMS"}


def test_another_vocabulary_is_verified_again(entry):
    tokens.read_tokens(entry, V)
    with pytest.raises(InputError, match=r"token id \d+ is outside the vocabulary of 100"):
        tokens.read_tokens(entry, 100)


@pytest.mark.parametrize("name", FILES)
def test_a_byte_that_changes_after_verification_is_found(entry, name):
    tokens.read_tokens(entry, V)
    flip_bit(entry / name, 100)
    with pytest.raises(InputError, match="damaged"):
        tokens.read_tokens(entry, V)


def test_the_full_check_ignores_what_was_verified_before(entry):
    tokens.read_tokens(entry, V)
    flip_bit(entry / "train-00000.bin", keep_time=True)
    assert data.find_entry_damage(entry, V) == ["train-00000.bin: changed"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"null"])
def test_a_damaged_record_of_the_verification_is_ignored_and_replaced(entry, hashed, content):
    tokens.read_tokens(entry, V)
    good = (entry / "verified.json").read_bytes()
    (entry / "verified.json").write_bytes(content)
    hashed.clear()
    tokens.read_tokens(entry, V)
    assert set(hashed) == set(FILES) - {"SHA256SUMS"}
    assert (entry / "verified.json").read_bytes() == good


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EROFS, False), (errno.EACCES, False), (errno.ENOSPC, True)]
)
def test_a_verification_that_cannot_be_recorded_is_no_error(
    entry, monkeypatch, capsys, number, said
):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    expected = read(entry)
    (entry / "verified.json").unlink()
    capsys.readouterr()
    monkeypatch.setattr(Path, "replace", refuse)
    assert read(entry) == expected
    assert ("verified.json (" in capsys.readouterr().err) == said
    assert tuple(sorted(os.listdir(entry))) == FILES


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_shard_that_cannot_be_read_is_not_called_damaged(entry, monkeypatch, number):
    def refuse(file):
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr(manifest, "file_sha256", refuse)
    message = rf"{entry}/.* cannot be read: {os.strerror(number)}"
    with pytest.raises(InputError, match=message) as raised:
        tokens.read_tokens(entry, V)
    assert "damaged" not in str(raised.value)
    with pytest.raises(InputError, match=message):
        data.find_entry_damage(entry, V)


# Tokenized again


def test_rebuild_repairs_its_entry_and_touches_no_other(entry, path, tmp_path, cache):
    (tmp_path / "b.txt").write_text("another text")
    prepare(str(tmp_path / "b.txt"), cache=cache)
    (other,) = set(entries(cache)) - {entry}
    before = {file: os.stat(file) for file in (other, *other.iterdir())}
    good = read(entry)
    flip_bit(entry / "train-00000.bin", 3)
    with pytest.raises(InputError, match="--data.rebuild True"):
        prepare(path, cache=cache)
    corpus = prepare(path, cache=cache, rebuild=True)
    assert read(entry)["train"] == corpus.train[:].tolist() == good["train"]
    assert sorted(entries(cache)) == sorted([entry, other])
    assert {file: os.stat(file) for file in (other, *other.iterdir())} == before
    assert len(os.listdir(Path(cache, "tokens"))) == 3


def test_an_entry_can_be_rebuilt_while_it_is_memory_mapped(entry, path, cache):
    stream = tokens.read_tokens(entry, V)["train"]
    prepare(path, cache=cache, rebuild=True)
    assert read(entry)["train"] == stream[:].tolist() == [EOT, *TEXT.encode()][: len(stream)]


def test_a_rebuild_that_fails_leaves_the_old_entry(entry, path, cache, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 50)
    before = read(entry), os.stat(entry).st_ino
    with pytest.raises(RuntimeError, match="the tokenizer broke"):
        prepare(path, tokenizer=Counting(break_after_500), cache=cache, rebuild=True)
    assert (read(entry), os.stat(entry).st_ino) == before


def test_processes_that_rebuild_at_the_same_time_encode_once(entry, path, cache, capsys):
    counting = Counting()
    waiting = threading.Thread(
        target=lambda: prepare(path, tokenizer=counting, cache=cache, rebuild=True)
    )
    with cache_module.lock_cache(entry.parent):
        waiting.start()
        deadline = time.monotonic() + 20
        while "waiting for another" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        documents = [("train", ["written meanwhile"]), ("val", ["this too"])]
        tokens.write_tokens(entry, documents, BYTES, replace=True)
    waiting.join()
    assert counting.encoded == 0
    assert read(entry)["train"] == [EOT, *b"written meanwhile"]


# Atomic writes


def test_a_failure_leaves_nothing_behind(path, cache, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 50)
    with pytest.raises(RuntimeError, match="the tokenizer broke"):
        prepare(path, tokenizer=Counting(break_after_500), cache=cache)
    assert os.listdir(Path(cache, "tokens")) == ["lock"]


def test_a_file_size_limit_is_named_with_its_remedy(path, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(
            InputError,
            match=rf"cannot write .*{cache}/tokens/.*/train-00000.bin: .*too large; free .*"
            "data.cache",
        ):
            prepare(path, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(Path(cache, "tokens")) == ["lock"]
    assert prepare(path, cache=cache, val_fraction=0.0).train[:].tolist() == [EOT, *TEXT.encode()]


@pytest.mark.parametrize(
    ("place", "name"),
    [*((Path, name) for name in ("mkdir", "open", "write_text", "rename")), (os, "fsync")],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_whatever_cannot_be_written_is_named_with_its_remedy(
    path, cache, monkeypatch, place, name, number
):
    Path(cache, "tokens").mkdir(parents=True)
    real = getattr(place, name)

    def refuse(target, *args, **options):
        if isinstance(target, Path) and not target.is_relative_to(cache):
            return real(target, *args, **options)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(place, name, refuse)
        with pytest.raises(
            InputError, match=rf"cannot write .*{cache}.*{os.strerror(number)}.*set data.cache"
        ):
            prepare(path, cache=cache)
    assert entries(cache) == []
    assert not list(Path(cache, "tokens").glob("*.partial"))
    assert prepare(path, cache=cache, val_fraction=0.0).train[:].tolist() == [EOT, *TEXT.encode()]


def test_a_cache_that_cannot_be_written_is_refused(path):
    with pytest.raises(InputError, match=r"cannot write to .*a.txt/tokens.*set data.cache"):
        prepare(path, cache=path)


KILLED = """
import os, signal, sys
from jaxgpt import data
from jaxgpt.data import tokens
from jaxgpt.tokenizer import TokenizerConfig, build
append, tokens.PIECE = tokens._append, 50
def append_and_die(entry, split, shards, array):
    append(entry, split, shards, array)
    if sum(shards) > 500:
        os.kill(os.getpid(), signal.SIGKILL)
tokens._append = append_and_die
cfg = data.DataConfig(paths=(sys.argv[1],), cache=sys.argv[2], rebuild=True)
data.prepare(cfg, build(TokenizerConfig(kind="bytes"), []))
"""


def run(script, *args, **options):
    command = [sys.executable, "-c", script, *args]
    return subprocess.Popen(command, cwd=Path(data.__file__).parents[2], text=True, **options)


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_run_leaves_no_half_entry(path, cache, there):
    if there:
        prepare(path, cache=cache)
    assert run(KILLED, path, cache).wait(60) == -signal.SIGKILL
    assert len(list(Path(cache, "tokens").glob("*.partial"))) == 1
    assert len(entries(cache)) == there

    corpus = prepare(path, cache=cache)
    assert corpus.train[:].tolist() == [EOT, *TEXT[: int(0.9 * len(TEXT))].encode()]
    if not there:  # a run that writes deletes what others left
        assert not list(Path(cache, "tokens").glob("*.partial"))


WAITING = """
import signal, sys
from pathlib import Path
from jaxgpt.data import cache as cache_module
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
with cache_module.lock_cache(Path(sys.argv[1])):
    pass
"""


def test_a_signal_ends_the_wait_for_another_process(tmp_path):
    with cache_module.lock_cache(tmp_path):
        waiting = run(WAITING, str(tmp_path), stderr=subprocess.PIPE)
        try:
            assert "waiting for another process" in waiting.stderr.readline()
            time.sleep(0.2)  # the message comes just before it waits
            waiting.send_signal(signal.SIGTERM)
            assert waiting.wait(20) == 128 + signal.SIGTERM
            assert waiting.stderr.read() == ""
        finally:
            waiting.kill()
            waiting.communicate()


@pytest.mark.parametrize("locks", [True, False])
def test_only_partial_entries_without_a_writer_are_removed(tmp_path, monkeypatch, locks):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def make(name, age):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train-00000.bin").touch()
        for file in (folder / "train-00000.bin", folder):
            os.utime(file, (time.time() - age,) * 2)
        return folder

    here, elsewhere = platform.node(), "another.example.org"
    young = {machine: make(f"e.1.{machine}.partial", 3600) for machine in (here, elsewhere)}
    old = {machine: make(f"e.2.{machine}.partial", 90_000) for machine in (here, elsewhere)}
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with cache_module.lock_cache(tmp_path):
        assert young[elsewhere].exists()
        assert young[here].exists() != locks  # the lock says that its writer is dead
        assert not any(folder.exists() for folder in old.values())


def test_without_locks_the_entry_of_the_faster_machine_is_kept(path, cache, tmp_path):
    prepare(path, cache=cache)
    (done,) = entries(cache)
    done.rename(tmp_path / "theirs")

    def finish_first(encoded):
        if not done.exists():
            shutil.copytree(tmp_path / "theirs", done)
            (done / "theirs").touch()

    prepare(path, cache=cache, tokenizer=Counting(finish_first))
    assert (done / "theirs").exists()
    assert sorted(os.listdir(Path(cache, "tokens"))) == sorted([done.name, "lock"])


def test_old_formats_are_not_opened(path, cache, monkeypatch):
    monkeypatch.setattr(corpus_module, "FORMAT", 1)
    fingerprint = prepare(path, cache=cache).fingerprint
    monkeypatch.undo()
    assert prepare(path, cache=cache).fingerprint == fingerprint
    assert len(entries(cache)) == 2


def test_a_user_without_a_home_folder_is_told_what_to_set(path):
    with pytest.raises(InputError, match="set JAXGPT_CACHE to a folder"):
        prepare(path, cache="~no-such-user/cache")
