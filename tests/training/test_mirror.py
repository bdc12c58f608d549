"""Runs that are kept in a bucket or on a mount: copied, resumed elsewhere, never overwritten."""

import json
import shutil
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

import jaxgpt
import train
from jaxgpt import cli, config
from jaxgpt import store as stores
from jaxgpt.errors import InputError, TrainingError
from jaxgpt.manifest import write_manifest
from jaxgpt.training import checkpoint, loop, mirror
from jaxgpt.training.lock import RunLock
from tests.runs import assert_same_run, flip, losses_of, run

RUNS = "memory://bucket/runs"
PLACE = f"{RUNS}/a"


@pytest.fixture
def memory(monkeypatch):
    """An empty bucket in memory, and short waits."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    monkeypatch.setattr(stores, "PAUSES", (0.0,))
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "REFRESH_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "EXPIRES_SECONDS", 0.4)
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def machine(here, monkeypatch):
    """Makes this process another machine, which has a cache folder of its own."""

    def move(name: str) -> None:
        monkeypatch.setenv("JAXGPT_CACHE", str(here / name))
        monkeypatch.setattr(mirror.socket, "gethostname", lambda: name)

    move("one")
    return move


@pytest.fixture
def stored(trained, memory, machine):
    """A run in the bucket, of which this machine has nothing."""
    memory.put("runs/a", "/bucket/runs/a", recursive=True)
    return memory


def config_of(runs: str = RUNS, **options) -> config.Config:
    cfg = config.read("tiny.py")
    return replace(cfg, name="a", runs=runs, checkpoint=replace(cfg.checkpoint, **options))


@contextmanager
def opened(cfg: config.Config):
    """A run before its first step."""
    with RunLock(cfg.folder), mirror.Mirror(cfg) as copies:
        yield copies


def copy_run(cfg: config.Config, start: int = 6) -> None:
    """What a run does that has nothing left to train."""
    with opened(cfg) as copies:
        copies.begin(start)


def give(cfg: config.Config, *steps: int, went_back: tuple[int, ...] = ()) -> None:
    """Puts a run with checkpoints of some steps into the folder in which it is trained."""
    shutil.copytree("runs/a", cfg.folder, ignore=lambda *_: ["checkpoints", "lock"])
    for step in steps:
        folder = cfg.folder / "checkpoints" / str(step)
        shutil.copytree("runs/a/checkpoints/6", folder)
        lineage = json.loads((folder / "lineage.json").read_text())
        (folder / "lineage.json").write_text(json.dumps(lineage | {"went_back_to": went_back}))
        (folder / "metrics.json").write_text(json.dumps({"step": step, "val_loss": 9 - step}))
        (folder / "evaluation.json").unlink()
        write_manifest(folder)


def steps_at(place: str = PLACE) -> list[int]:
    return checkpoint.Remote(stores.Store(place)).steps()


def steps_here(cfg: config.Config) -> list[int]:
    return checkpoint.steps_in(cfg.folder / "checkpoints")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run that are copied."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in mirror.NOT_COPIED
    }


def test_a_run_resumes_on_another_machine_bit_exactly(
    trained, memory, machine, monkeypatch, capsys
):
    log = loop.telemetry.Telemetry.log

    def failing(self, step, values):  # when step 5 is taken
        log(self, step, values)
        if step == 4 and "loss" in values:
            monkeypatch.setattr(loop.telemetry.Telemetry, "log", log)
            raise TrainingError("the machine is taken away")

    monkeypatch.setattr(loop.telemetry.Telemetry, "log", failing)
    assert run("--runs", RUNS) == 1
    assert steps_at() == [3, 5]
    machine("two")
    assert run("--runs", RUNS) == 0
    output = capsys.readouterr().out
    assert f"downloading step 5 of {PLACE}" in output and "resumed after step 5" in output
    memory.get("/bucket/runs/a", "runs/copied", recursive=True)
    assert_same_run("a", "copied", 6)
    records = [*map(json.loads, Path("runs/copied/metrics.jsonl").read_text().splitlines())]
    assert records[-1]["finished"] == 6
    assert steps_at() == [3, 5, 6] and "lease.json" not in stores.Store(PLACE).files()


@pytest.mark.parametrize("where", ["memory", "file", "mount", "s3"])
def test_a_run_is_copied_there_and_back(trained, memory, machine, where, request):
    if where == "s3":
        request.getfixturevalue("bucket")
    folder = Path.cwd() / "drive"
    runs = {"memory": RUNS, "file": f"file://{folder}", "mount": str(folder), "s3": "s3://books/r"}
    one, two = (
        config_of(runs[where], keep=1, keep_best=False, local=local if where == "mount" else "")
        for local in ("disk", "disk2")
    )
    give(one, 3, 6)
    (one.folder / "checkpoints" / "7.saving").mkdir()
    assert one.folder.is_relative_to(Path("disk") if where == "mount" else Path("one").absolute())
    copy_run(one)
    assert steps_at(one.place) == [6]
    machine("two")
    with opened(two):
        assert steps_here(two) == [6]
        expected = {n: c for n, c in contents(one.folder).items() if "checkpoints/3" not in n}
        assert contents(two.folder) == expected
    if where in ("file", "mount"):  # a run like any other
        assert not list(folder.rglob("*.draft"))
        assert jaxgpt.load(folder / "a").params["wte"].shape == (128, 32)


# Loading models


def test_models_are_loaded_from_a_url(stored, capsys):
    expected = jaxgpt.load("runs/a@3")
    loaded = jaxgpt.load(f"{PLACE}@3")
    np.testing.assert_array_equal(loaded.params["wte"], expected.params["wte"])
    for path in (PLACE, f"{PLACE}@best", f"{PLACE}/checkpoints/6", f"{PLACE}/checkpoints/"):
        assert cli.main(["generate", path, "the q", "--tokens", "4", "--seed", "4"]) == 0
        assert capsys.readouterr().out == jaxgpt.load("runs/a")("the q", 4, seed=4) + "\n"
    (folder,) = (Path("one") / "downloads" / "checkpoints").glob("*/6")
    assert not (folder / "train").exists()  # the state of the optimizer is not needed


def test_a_model_is_downloaded_once(stored, monkeypatch):
    jaxgpt.load(PLACE)
    monkeypatch.setattr(stores.Store, "download", None)  # nothing is downloaded again
    jaxgpt.load(PLACE)
    (file,) = Path("one").rglob("6/tokenizer.json")
    flip(file)
    with pytest.raises(TypeError):  # but what is damaged is
        jaxgpt.load(PLACE)


def test_a_run_starts_from_one_at_a_url(stored):
    plain = "from jaxgpt.config import Config; from jaxgpt.data import DataConfig; config = Config("
    options = "data=DataConfig(paths=('text.txt',)))"
    Path("plain.py").write_text(plain + options)
    short = ("--train.steps", "1", "--train.sample_tokens", "0")
    assert run("--start", f"{PLACE}@3", *short, name="next", config="plain.py") == 0
    lineage = checkpoint.read_metadata("runs/next")["lineage"]["started_from"]
    assert lineage["path"] == f"{PLACE}@3" and lineage["step"] == 3
    assert losses_of("next").keys() == {1}


STAGES = """
from dataclasses import replace
from tiny import config as tiny
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import TokenizerConfig

short = replace(tiny, train=replace(tiny.train, steps=1))
base = replace(short, name="base")
then = replace(short, name="then", start="base", model=GPTConfig(), tokenizer=TokenizerConfig())
config = [base, then]
"""


@pytest.mark.slow
def test_the_stages_of_a_pipeline_are_at_a_url(here, memory, machine, capsys):
    Path("two.py").write_text(STAGES)
    assert train.main(["two.py", "--runs", RUNS]) == 0
    assert memory.exists("/bucket/runs/two/report.html")
    machine("two")
    assert train.main(["two.py", "--runs", RUNS, "--stages", "then"]) == 0
    output = capsys.readouterr().out
    assert f"{RUNS}/two/then has all its 1 steps" in output
    (then,) = Path("two/runs").glob("*/then")
    lineage = checkpoint.read_metadata(then)["lineage"]["started_from"]
    assert lineage["path"] == f"{RUNS}/two/base"


def test_a_report_is_written_on_a_run_at_a_url(stored, capsys):
    assert cli.main(["report", PLACE]) == 2
    assert "set --output to a folder" in capsys.readouterr().err
    for path, folder in ((PLACE, "one"), ("runs/a", "two")):
        assert cli.main(["report", path, "--output", folder]) == 0
    assert Path("one/report.md").read_text() == Path("two/report.md").read_text()
    assert cli.main(["report", "memory://bucket/none", "--output", "one"]) == 2
    assert "there is no run at memory://bucket/none" in capsys.readouterr().err


def test_a_sweep_at_a_url_is_refused(here, capsys):
    options = ("--values", "optim.clip", "1", "2", "--", "--runs", RUNS)
    assert cli.main(["sweep", "tiny.py", *options]) == 2
    assert "the runs of a sweep stay in a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["runs", "verify"])
def test_commands_on_folders_refuse_a_url(command, capsys):
    assert cli.main([command, RUNS]) == 2
    assert f"{RUNS} is a URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"{PLACE}@7", f"{PLACE}@7: no such checkpoint; use best or one of the steps 3, 6"),
        (RUNS, "there is no checkpoint at memory://bucket/runs; there are a"),
        ("memory://bucket/none", "there is no checkpoint at memory://bucket/none; check"),
        ("nothing://a", "nothing://a cannot be used: Protocol not known: nothing"),
    ],
)
def test_a_model_that_is_not_at_a_url_is_explained(stored, path, words):
    for ask in (jaxgpt.load, loop.load):
        with pytest.raises(InputError) as caught:
            ask(path)
        assert words in str(caught.value)


# Damage, and networks that fail


def damage(memory, step: int) -> None:
    """Changes one bit of a checkpoint in the bucket."""
    found = memory.find(f"/bucket/runs/a/checkpoints/{step}/ema")
    name = max(found, key=memory.size)
    content = bytearray(memory.cat_file(name))
    content[len(content) // 2] ^= 1
    memory.pipe_file(name, bytes(content))


def test_a_damaged_checkpoint_in_the_bucket_is_not_used(stored, machine, capsys, caplog):
    damage(stored, 6)
    assert jaxgpt.load(PLACE).params["wte"].shape == (128, 32)
    assert "6 is damaged" in caplog.text
    machine("two")
    cfg = config_of()
    copy_run(cfg, 3)
    assert "it is damaged: ema/" in capsys.readouterr().err
    assert steps_here(cfg) == steps_at() == [3]
    assert stored.exists("/bucket/runs/a/checkpoints/6.damaged/params")
    damage(stored, 3)
    machine("three")
    with pytest.raises(InputError, match=f"no checkpoint in {PLACE} is intact; nothing was chang"):
        copy_run(config_of())
    with pytest.raises(InputError, match="no checkpoint at .* is intact"):
        jaxgpt.load(PLACE)


@pytest.mark.parametrize("content", [b"\0\1", b"0" * 64 + b"  ../../../evil\n"])
def test_a_damaged_manifest_in_the_bucket_is_not_used(stored, content):
    stored.pipe_file("/bucket/runs/a/checkpoints/6/SHA256SUMS", content)
    assert len(jaxgpt.load(PLACE).params) > 0
    with opened(config_of()):
        assert steps_here(config_of()) == [3]


def test_an_upload_that_was_cut_does_not_count(trained, memory, machine, monkeypatch):
    upload = stores.Store.upload

    def cut(self, name, file):
        if name.startswith("checkpoints/6/train"):
            raise InputError("cut off")
        upload(self, name, file)

    one = config_of(patience=0.0)
    give(one, 3)
    copy_run(one, 3)
    shutil.rmtree(one.folder)
    give(one, 3, 6)
    monkeypatch.setattr(stores.Store, "upload", cut)
    with pytest.raises(TrainingError) as caught:
        copy_run(one)
    assert f"not copied completely to {PLACE}: cut off. It is whole in {one.folder}" in str(
        caught.value
    )
    assert memory.exists("/bucket/runs/a/checkpoints/6/params") and steps_at() == [3]
    monkeypatch.setattr(stores.Store, "upload", upload)
    machine("two")
    with opened(two := config_of()):
        assert steps_here(two) == [3]
    machine("one")
    copy_run(one)
    machine("three")
    with opened(three := config_of()):
        assert steps_here(three) == [6]
        folder = Path("checkpoints") / "6"
        assert contents(three.folder / folder) == contents(one.folder / folder)


def test_an_upload_that_fails_is_tried_again(trained, memory, machine, monkeypatch, capsys):
    upload, failures = stores.Store.upload, []

    def failing(self, name, file):
        if len(failures) < 30:
            failures.append(name)
            raise InputError("no network")
        upload(self, name, file)

    monkeypatch.setattr(stores.Store, "upload", failing)
    cfg = config_of()
    give(cfg, 6)
    copy_run(cfg)
    error = capsys.readouterr().err
    assert error.count("no network; training goes on, and the copy is tried again") == 1
    assert f"the run is copied to {PLACE} again" in error
    assert steps_at() == [6]


def test_a_download_that_was_cut_continues(stored, monkeypatch):
    download, names = stores.Store.download, []

    def cut(self, name, file):
        names.append(name)
        if len(names) == 20:
            raise InputError("cut off")
        download(self, name, file)

    monkeypatch.setattr(stores.Store, "download", cut)
    with pytest.raises(InputError, match="cut off"):
        copy_run(config_of())
    assert not steps_here(config_of()) and "lease.json" not in stores.Store(PLACE).files()
    copy_run(config_of())
    assert steps_here(config_of()) == [6]
    twice = {name for name in names if names.count(name) > 1}
    assert len(twice) == 1


# What counts of two copies


def test_what_is_deleted_here_is_deleted_there(trained, memory, machine):
    cfg = config_of(keep=1, keep_best=False)
    give(cfg, 3, 4)
    copy_run(cfg, 4)
    memory.pipe_file("/bucket/runs/a/checkpoints/2/train/x", b"of an upload that was cut")
    shutil.rmtree(cfg.folder)
    give(cfg, 4, 6)
    copy_run(cfg)
    assert {name.split("/")[5] for name in memory.find("/bucket/runs/a/checkpoints")} == {"6"}


def test_the_best_checkpoint_is_kept(trained, memory, machine):
    cfg = config_of(keep=1)
    give(cfg, 3, 4, 6)
    folder = cfg.folder / "checkpoints" / "3"
    (folder / "metrics.json").write_text(json.dumps({"step": 3, "val_loss": 0.5}))
    write_manifest(folder)
    copy_run(cfg)
    assert steps_at() == [3, 6]


def test_going_back_holds_on_other_machines(trained, memory, machine, capsys):
    one = config_of()
    give(one, 3, 6)
    copy_run(one)
    machine("two")
    two = config_of()
    give(two, 3, 5, went_back=(3,))
    copy_run(two, 5)
    assert "6 is abandoned" in capsys.readouterr().err
    assert steps_at() == [3, 5]
    assert memory.exists("/bucket/runs/a/checkpoints/6.abandoned/SHA256SUMS")
    machine("one")
    copy_run(one, 5)
    assert steps_here(one) == [3, 5] and (one.folder / "checkpoints/6.abandoned").exists()
    assert f"downloading step 5 of {PLACE} to {one.folder}, which has step 6" in (
        capsys.readouterr().out
    )


def test_the_newer_one_of_two_copies_wins(stored, machine, capsys):
    cfg = config_of()
    give(cfg, 3, 8)
    copy_run(cfg, 8)
    assert f"{cfg.folder} has step 8, and {PLACE} step 6: training resumes from the folder" in (
        capsys.readouterr().out
    )
    assert steps_at() == [3, 6, 8]
    shutil.rmtree(cfg.folder / "checkpoints" / "8")
    copy_run(cfg, 8)
    assert f"downloading step 8 of {PLACE}" in capsys.readouterr().out
    assert steps_here(cfg) == [3, 8]


def test_an_older_step_is_downloaded_to_go_back_to(stored):
    with opened(replace(config_of(), resume=3)):
        assert steps_here(config_of()) == [3, 6]


# The lease


def write_lease(memory, **values) -> None:
    lease = {"id": "other", "host": "elsewhere", "pid": 7, "time": time.time(), **values}
    memory.pipe_file("/bucket/runs/a/lease.json", json.dumps(lease).encode())


@contextmanager
def trains(memory):
    """Another machine trains the run meanwhile."""
    ended = threading.Event()

    def renew():
        while not ended.wait(0.02):
            write_lease(memory)

    thread = threading.Thread(target=renew)
    write_lease(memory)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_run_that_another_machine_trains_is_refused(here, memory, machine, capsys):
    with trains(memory):
        assert run("--runs", RUNS) == 2
    assert f"{PLACE} is being trained by process 7 on host elsewhere" in capsys.readouterr().err
    assert not list(Path("one").rglob("*.json"))


def test_a_lease_that_is_not_renewed_expires(trained, memory, machine, capsys):
    write_lease(memory)
    with opened(config_of()):
        assert "waiting for up to 0.4 s to see whether it still is" in capsys.readouterr().out
    write_lease(memory, time=time.time() - 3600)
    with opened(config_of()):
        assert "waiting" not in capsys.readouterr().out


def test_a_process_that_was_killed_is_replaced_at_once(trained, memory, machine, capsys):
    killed = mirror.Mirror(config_of())
    config_of().folder.mkdir(parents=True)
    killed.__enter__()
    assert stores.Store(PLACE).files().keys() == {"lease.json"}
    with opened(config_of()):
        assert not capsys.readouterr().out


def test_a_lease_that_is_being_written_at_the_end_does_not_stay(
    trained, memory, machine, monkeypatch
):
    write, writes = mirror.Mirror._write_lease, threading.Event()

    def slow(self):
        if threading.current_thread() is not threading.main_thread():
            writes.set()
            time.sleep(0.3)
        write(self)

    monkeypatch.setattr(mirror.Mirror, "_write_lease", slow)
    with opened(config_of()) as copies:
        copies.begin(0)
        assert writes.wait(10)
    time.sleep(0.4)
    assert not memory.exists("/bucket/runs/a/lease.json")


def test_a_run_that_is_taken_over_ends_and_writes_nothing_more(
    here, memory, machine, monkeypatch, capsys
):
    log = loop.telemetry.Telemetry.log

    with ExitStack() as other:

        def taken_over(self, step, values):
            log(self, step, values)
            if step == 4 and "loss" in values:
                other.enter_context(trains(memory))
                time.sleep(0.5)

        monkeypatch.setattr(loop.telemetry.Telemetry, "log", taken_over)
        assert run("--runs", RUNS, "--train.steps", "9") == 1
    assert "is now trained by process 7 on host elsewhere" in capsys.readouterr().err
    assert json.loads(memory.cat_file("/bucket/runs/a/lease.json"))["id"] == "other"
    assert not steps_at() or steps_at() == [3]
    (local,) = Path("one/runs").glob("*/a")
    assert max(checkpoint.steps_in(local / "checkpoints")) >= 4  # saved, and not copied


# What cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--runs", "nothing://x"), "Protocol not known"),
        (("--runs", "gs:/bucket"), "with two slashes"),
        (("--runs", "/proc/x", "--checkpoint.local", "disk"), "/proc/x/a cannot be written"),
        (("--runs", RUNS, "--parallel.processes", "0"), "mount the bucket on all of their"),
        (("--checkpoint.local", "disk", "--parallel.processes", "0"), "is for one process"),
        (("--checkpoint.local", RUNS), "is a URL"),
        (("--runs", RUNS, "--start", "memory://bucket/none"), "there is no checkpoint at"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_at_once(
    here, memory, machine, capsys, options, words
):
    assert run("--parallel.devices", "0", *options) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().rglob("*.json"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotImplementedError(), "can be read and not written"),
        (FileNotFoundError("The specified bucket does not exist"), "does not exist; check"),
        (PermissionError("Access Denied"), "is refused (Access Denied); set the credentials"),
        (OSError("Forbidden: https://storage"), "is refused (Forbidden"),
        (ConnectionError("reset"), "did not answer (reset); check the address and the network"),
    ],
)
def test_what_a_store_answers_is_explained(trained, memory, machine, monkeypatch, error, words):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(type(memory), "pipe_file", failing)
    with pytest.raises(InputError) as caught, opened(config_of()):
        pass
    assert words in str(caught.value)
