"""Streamed text: batch k is a function of the files, the seed and k, whatever the cache has."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxgpt import config, data
from jaxgpt.data import remote, streaming
from jaxgpt.data.sources import open_files
from jaxgpt.data.split import split
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.tokenizer import TokenizerConfig, build
from jaxgpt.training.inputs import prepare_data
from tests import runs
from tests.fake_hub import COMMIT, OLD, running_hub
from tests.tiny import ROOT

BYTES = build(TokenizerConfig(kind="bytes"), [])
EOT = BYTES.eot
SHARDS, CONTEXT, BATCH = 6, 16, 4
server = pytest.fixture(running_hub)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    seconds = []
    monkeypatch.setattr(remote, "wait", seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def documents(shard, count=5):
    """Texts of which every word is in one document only."""
    return [" ".join(f"{shard}.{n}.{word}" for word in range(9)) for n in range(count)]


def shard(number, count=5):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents(number, count)).encode()


@pytest.fixture
def hub(server, waits, cache):
    """A data set of several files of different sizes."""
    server.add("me/mine", {f"data/train-{n}.jsonl": shard(n, 3 + n) for n in range(SHARDS)})
    yield server
    for thread in threading.enumerate():  # files that are still read ahead
        if thread.name == "background":
            thread.join()


CFG = data.DataConfig(paths=("hf:me/mine",), stream=True, val_fraction=0.0)


def stream(cfg=CFG, seed=0, process=(0, 1), **options):
    return data.stream(
        cfg,
        BYTES,
        **{"context": CONTEXT, "batch": BATCH, "seed": seed} | options,
        process_index=process[0],
        process_count=process[1],
    )


def rows(dataset, steps):
    """The tokens of some batches, with the last target: int[steps * B, T + 1]."""
    batches = map(dataset.batch, steps)
    return np.concatenate([np.c_[b["tokens"], b["targets"][:, -1]] for b in batches])


def tokens_of(texts):
    return [token for text in texts for token in [EOT, *BYTES.encode(text)]]


def windows_of(texts):
    """All rows of a file: one every CONTEXT tokens, the last one moved back to the end."""
    tokens = tokens_of(texts)
    last = len(tokens) - CONTEXT - 1
    starts = [*range(0, last, CONTEXT), last]
    return [tuple(tokens[start : start + CONTEXT + 1]) for start in starts]


EPOCH = [window for number in range(SHARDS) for window in windows_of(documents(number, 3 + number))]
STEPS = len(EPOCH) // BATCH + 1


# Batches


def test_an_epoch_has_every_row_of_every_file_once(hub):
    dataset = stream()
    two = [*map(tuple, rows(dataset, range(2 * STEPS)).tolist())]
    first, second = two[: len(EPOCH)], two[len(EPOCH) : 2 * len(EPOCH)]
    assert Counter(first) == Counter(second) == Counter(EPOCH)
    assert first != second


def test_rows_of_a_file_are_together_and_files_are_shuffled(hub):
    owner = {
        window: number
        for number in range(SHARDS)
        for window in windows_of(documents(number, 3 + number))
    }
    orders = set()
    for seed in range(3):
        found = [owner[tuple(row)] for row in rows(stream(seed=seed), range(STEPS)).tolist()]
        order = tuple(dict.fromkeys(found[: len(EPOCH)]))
        assert found[: len(EPOCH)] == sorted(found[: len(EPOCH)], key=order.index)
        orders.add(order)
    assert len(orders) > 1 and (0, 1, 2, 3, 4, 5) not in orders


def test_without_shuffle_rows_keep_the_order_of_the_files(hub):
    found = rows(stream(replace(CFG, shuffle=False)), range(STEPS)).tolist()
    assert [*map(tuple, found)][: len(EPOCH)] == EPOCH


def test_documents_masked_and_stride_are_those_of_text_that_is_not_streamed(hub):
    options = {"documents": "masked", "stride": 5, "shuffle": False}
    hub.add("me/one", {"train.jsonl": shard(0)})
    cfg = replace(CFG, paths=("hf:me/one",), **options)
    whole = data.Batches(
        data.prepare(replace(cfg, stream=False), BYTES),
        cfg,
        context=CONTEXT,
        batch=BATCH,
    )
    dataset = stream(cfg)
    for step in range(4):
        for name, values in whole.batch(step).items():
            np.testing.assert_array_equal(dataset.batch(step)[name], values, strict=True)


def test_processes_make_the_rows_of_one_batch(hub):
    whole = stream().batch(7)["tokens"]
    parts = [stream(process=(n, 2)).batch(7)["tokens"] for n in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_weights_mix_the_paths(hub):
    hub.add("me/other", {"train.jsonl": shard(77, 30)})
    weights = replace(CFG, paths=("hf:me/mine", "hf:me/other"), weights=(1.0, 3.0))
    found = rows(stream(weights), range(10)).tolist()
    texts = [BYTES.decode(row) for row in found]
    assert sum("77." in text for text in texts) == 30
    assert found == rows(stream(weights), range(10)).tolist()


def test_a_file_smaller_than_a_row_is_passed_over(hub):
    hub.add("me/small", {"train-0.jsonl": b'{"text": "x"}\n', "train-1.jsonl": shard(0)})
    found = rows(stream(replace(CFG, paths=("hf:me/small",))), range(9)).tolist()
    assert all("0." in BYTES.decode(row) for row in found)
    hub.add("me/tiny", {"train.jsonl": b'{"text": "x"}\n'})
    with pytest.raises(TrainingError, match="no file has as many tokens as a row of 16"):
        stream(replace(CFG, paths=("hf:me/tiny",))).batch(0)


# The same with any cache


def test_batches_are_equal_with_a_cold_and_a_warm_cache_and_in_any_order(hub, cache):
    cold = rows(stream(), range(STEPS))
    hub.asked.clear()
    np.testing.assert_array_equal(rows(stream(), range(STEPS)), cold)
    assert not any("/resolve/" in path for _, path in hub.asked)
    backwards = stream()
    for step in reversed(range(STEPS)):
        np.testing.assert_array_equal(
            rows(backwards, [step]), cold[step * BATCH : (step + 1) * BATCH]
        )


def test_batches_are_equal_under_any_budget_and_the_disk_is_bounded(hub, cache, monkeypatch):
    hub.add("me/many", {f"train-{n:02}.jsonl": shard(n, 40) for n in range(12)})
    cfg = replace(CFG, paths=("hf:me/many",))
    steps = range(500)
    expected = rows(stream(cfg), steps)
    total = size_of(cache)
    budget = total / 3
    monkeypatch.setenv("JAXGPT_CACHE", str(cache / "small"))
    peaks, over = [0], threading.Event()

    def watch():
        while not over.is_set():
            peaks.append(size_of(cache / "small"))
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    np.testing.assert_array_equal(rows(stream(replace(cfg, disk_gb=budget / 1e9)), steps), expected)
    over.set()
    watching.join()
    assert 0 < max(peaks) <= budget + 5000  # beside the shards, a list of files and locks
    assert len(list((cache / "small/streams").glob("*/0*"))) < 12


def size_of(folder):
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def test_a_budget_too_small_for_one_file_is_refused(hub):
    with pytest.raises(InputError, match=r"data.disk_gb=1e-06 is too small: .*; set it to"):
        stream(replace(CFG, disk_gb=1e-6))


def test_a_resumed_run_does_not_read_earlier_files(hub, cache, monkeypatch):
    first = stream()
    expected = rows(first, range(STEPS))
    state = json.loads(json.dumps(first.state()))
    step = slice(-2 * BATCH, -BATCH)
    monkeypatch.setenv("JAXGPT_CACHE", str(cache / "another"))
    hub.asked.clear()
    found = rows(stream(state=state), [STEPS - 2])
    np.testing.assert_array_equal(found, expected[step])
    assert len({path for _, path in hub.asked if "/resolve/" in path}) < SHARDS
    monkeypatch.setenv("JAXGPT_CACHE", str(cache / "third"))
    np.testing.assert_array_equal(rows(stream(), [STEPS - 2]), expected[step])


def test_a_damaged_entry_is_downloaded_again(hub, cache):
    expected = rows(stream(), range(STEPS))
    for entry in cache.glob("streams/*/0*"):
        content = bytearray((entry / "train-00000.bin").read_bytes())
        content[5] ^= 1
        (entry / "train-00000.bin").write_bytes(content)
        os.utime(entry / "train-00000.bin", ns=(0, 0))
    np.testing.assert_array_equal(rows(stream(), range(STEPS)), expected)


KILLED = """
import os, signal, sys
import numpy as np
from jaxgpt import config, data
from jaxgpt.data import remote
from tests.data.test_streaming import CFG, rows, stream
remote.BLOCK = 100
read, files = remote._read_hub, set()
def read_and_die(repository, file, start, end):
    files.add(file)
    if start == 200 and len(files) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(repository, file, start, end)
remote._read_hub = read_and_die
dataset = stream()
for step in range(1000):
    dataset.batch(step)
"""


def test_a_run_killed_in_the_middle_of_a_download_reads_the_same_batches(hub, cache):
    expected = rows(stream(), range(STEPS))
    os.rename(cache, cache.with_name("uninterrupted"))
    for _ in range(2):
        command = [sys.executable, "-c", KILLED]
        killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
        assert killed.returncode == -signal.SIGKILL
        (part,) = cache.glob("downloads/*/*.incomplete")
        assert part.stat().st_size == 200
    hub.ranges.clear()
    np.testing.assert_array_equal(rows(stream(), range(STEPS)), expected)
    assert any(asked.startswith("bytes=200-") for asked in hub.ranges)


# What is held out


def test_a_part_of_the_first_file_is_held_out(hub, tmp_path):
    hub.add("me/long", {"train-0.jsonl": shard(0, 200), "train-1.jsonl": shard(1, 200)})
    cfg = replace(CFG, paths=("hf:me/long",), val_fraction=0.2)
    (tmp_path / "a.jsonl").write_bytes(shard(0, 200))
    held = {
        "".join(text)
        for name, text in split(open_files("", [str(tmp_path / "a.jsonl")]), 0.2)
        if name == "val"
    }
    dataset = stream(cfg)
    batches = [*dataset.held_out["val"]()]
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches]).tolist()
    texts = {kept: [t for t in documents(0, 200) if (t in held) != kept] for kept in (True, False)}
    assert targets == tokens_of(texts[False])[1:]
    expected = Counter(windows_of(texts[True]) + windows_of(documents(1, 200)))
    steps = -(-expected.total() // BATCH)
    found = rows(dataset, range(steps))[: expected.total()]
    assert Counter(map(tuple, found.tolist())) == expected


def test_validation_paths_are_read_before_training(hub, tmp_path):
    (tmp_path / "val.txt").write_text("some text to validate on")
    dataset = stream(replace(CFG, val_paths=(str(tmp_path / "val.txt"),)))
    (batch,) = dataset.held_out["val"]()
    assert BYTES.decode(batch["targets"][0].tolist()).startswith("some text")
    assert len(dataset.fingerprint["val_files"]) == 1


def test_a_tokenizer_is_trained_on_the_first_file(hub):
    assert [*data.texts(CFG)] == documents(0, 3)
    with pytest.raises(InputError, match="use tokenizer.kind=bpe or bytes, or data.stream=False"):
        [*data.texts(CFG, held_out=True)]


# What is refused, and errors while training


def test_local_paths_are_refused():
    with pytest.raises(InputError, match="text.txt is not one; set it to False, or use a URL"):
        replace(CFG, paths=("text.txt",)).check()


def test_a_wrong_column_is_found_before_the_first_step(hub):
    with pytest.raises(InputError, match="has no column 'body'"):
        stream(replace(CFG, fields=("text=body",)))


def test_files_that_changed_change_the_fingerprint(hub):
    before = stream().fingerprint
    assert json.loads(json.dumps(before)) == stream().fingerprint
    hub.add("me/mine", {**hub.repositories["me/mine"][COMMIT], "data/train-0.jsonl": shard(9)}, OLD)
    hub.main = OLD
    assert stream().fingerprint["files"] != before["files"]
    with pytest.raises(InputError, match="the data differs"):
        data.refuse_changed(before, stream(replace(CFG, documents="masked")).fingerprint)


def test_a_file_that_fails_while_read_ahead_is_tried_again_when_it_is_needed(hub, monkeypatch):
    expected = rows(stream(), range(STEPS))
    monkeypatch.setenv("JAXGPT_CACHE", os.environ["JAXGPT_CACHE"] + "2")

    def fail(self, number):
        raise InputError("no network")

    monkeypatch.setattr(streaming.Shards, "_read_ahead", fail)
    np.testing.assert_array_equal(rows(stream(), range(STEPS)), expected)


def test_a_file_that_cannot_be_read_ends_training_with_its_name(hub):
    files = {**hub.repositories["me/mine"][COMMIT], "data/train-3.jsonl": b"{"}
    hub.add("me/bad", files)
    dataset = stream(replace(CFG, paths=("hf:me/bad",)))
    with pytest.raises(TrainingError, match=r"batch \d+ cannot be read: .*train-3.jsonl.*resumes"):
        rows(dataset, range(STEPS))


def test_a_resumed_run_reads_the_revision_that_it_began_with(hub):
    cfg = config.Config(data=CFG, tokenizer=TokenizerConfig(kind="bytes"))
    _, text, dataset, _ = prepare_data(cfg, {})
    expected = dataset.batch(3)
    assert dataset.fingerprint["revisions"] == {"me/mine@main": COMMIT}
    saved = {
        "config": config.to_dict(replace(cfg, model=replace(cfg.model, V=text.vocab_size))),
        "tokenizer": text.to_json(),
        "data": json.loads(json.dumps(dataset.fingerprint)),
        "data_state": dataset.state(),
    }
    hub.main = OLD
    hub.add("me/mine", {"data/train-0.jsonl": shard(9)}, OLD)
    *_, resumed, _ = prepare_data(cfg, {**saved, "versions": {}})
    for name, values in expected.items():
        np.testing.assert_array_equal(resumed.batch(3)[name], values)
    *_, new, _ = prepare_data(cfg, {})
    assert new.fingerprint["revisions"] == {"me/mine@main": OLD}


def test_a_wait_for_data_can_be_ended(hub, monkeypatch):
    read, reachable = remote._read_hub, threading.Event()
    reachable.set()
    monkeypatch.setattr(remote, "_read_hub", lambda *args: reachable.wait(20) and read(*args))
    dataset = stream()
    reachable.clear()
    threading.Timer(0.2, dataset.stop.set).start()
    with pytest.raises(TrainingError, match="stopped while it waited for training data"):
        rows(dataset, range(STEPS))
    reachable.set()
    dataset.stop.clear()
    rows(dataset, range(STEPS))


@pytest.mark.slow
def test_a_run_is_saved_and_resumes_exactly_after_its_data_failed_to_come(
    hub, monkeypatch, tmp_path, capsys
):
    runs.settle(tmp_path, monkeypatch)
    options = ("--data.paths", "hf:me/mine", "--data.stream", "True", "--data.val_fraction", "0")
    options += ("--tokenizer.kind", "bytes", "--checkpoint.every", "100", "--train.steps", "24")
    assert runs.run(*options, name="whole") == 0
    read, over, left = remote._read_hub, threading.Event(), [3]

    def signal_and_wait(*args):
        left[0] -= 1
        if left[0] == -1:
            runs.wait_for_step("cut", 1)
            steps = 0
            while steps != (steps := len(runs.losses_of("cut"))):  # until the loop waits for data
                time.sleep(3)
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(60)
        return read(*args)

    def fail(*args):
        raise ConnectionError("cable cut")

    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cold"))
    monkeypatch.setattr(remote, "_read_hub", signal_and_wait)
    assert runs.run(*options, name="cut") == 128 + signal.SIGTERM
    over.set()
    assert "stopped while it waited for training data" in capsys.readouterr().err
    monkeypatch.setattr(remote, "_read_hub", fail)
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "colder"))
    assert runs.run(*options, name="cut") == 1
    error = capsys.readouterr().err
    assert "cable cut" in error and "the same command resumes" in error.lower()
    monkeypatch.setattr(remote, "_read_hub", read)
    hub.main = OLD  # the branch moves
    hub.add("me/mine", {"data/train-0.jsonl": shard(9)}, OLD)
    assert runs.run(*options, name="cut") == 0
    runs.assert_same_run("whole", "cut", 24)
    assert runs.run(*options, "--train.epochs", "2", name="more") == 2
    assert "train.epochs=2 needs the number of rows" in capsys.readouterr().err
