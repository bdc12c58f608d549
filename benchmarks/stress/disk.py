"""What happens to the disk: it fills up, is read-only, or the run's folder disappears."""

import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.training.checkpoint import CheckpointConfig

from .processes import has_option
from .runs import Bench, Row

LARGE = 256 << 20
PATIENCE = 0.1  # minutes that a run waits for room


@contextmanager
def small_disk(bench: Bench, size: int = LARGE) -> Iterator[Path]:
    """A disk of so many bytes, on which runs can start. Raises OSError if it cannot be made."""
    folder = bench.folder / "disk"
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        bench.write_inputs(folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    """Gives a small disk another size."""
    _mount("-o", f"remount,size={size}", str(folder))


def _mount(*options: str) -> None:
    try:
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(str(error)) from None
    if done.returncode:
        raise OSError(done.stderr.strip())


def used(folder: Path) -> int:
    """The bytes in use on the disk of a folder."""
    return shutil.disk_usage(folder).used


def disk(bench: Bench, number: int) -> Iterator[Row]:
    """A run that meets a full or read-only disk, or loses its folder, says so and is not lost."""
    bench.reference("base")
    try:
        with small_disk(bench) as folder:
            empty = used(folder)
            ended = bench.run("base", "base", cwd=folder, cache=folder / "cache")
            if wrong := ended.wrong(0):
                raise SystemExit(f"a run on a tmpfs fails: {wrong}")
            full = used(folder)
    except OSError as error:
        yield Row("disk", "a limit on file sizes, for no tmpfs can be mounted", (), str(error))
        for _ in range(number):
            yield _full_by_limit(bench)
    else:
        for turn in range(number):
            share = (turn + bench.rng.uniform(0, 1)) / number
            size = empty + int(share * (full - empty))
            yield _full(bench, size, share, room_soon=turn % 2 == 1)
        yield _read_only(bench)
    for what, lose in (("deleted", shutil.rmtree), ("renamed", _rename)):
        yield _lost_folder(bench, what, lose)


def patience() -> list[str]:
    """The option that lets a run wait for room for a few seconds only."""
    known = has_option(CheckpointConfig, "patience")
    return ["--checkpoint.patience", str(PATIENCE)] if known else []


def _full(bench: Bench, size: int, share: float, room_soon: bool) -> Row:
    """The disk fills up; there is room again after two seconds, or only after the run's end."""
    with small_disk(bench, size) as folder:
        places: Any = {"cwd": folder, "cache": folder / "cache"}
        process = bench.start("base", "base", *patience(), **places)
        if room_soon:

            def make_room() -> None:
                if process.wait_until(lambda: size - used(folder) < 16_384):
                    time.sleep(2)
                    resize(folder, LARGE)

            thread = threading.Thread(target=make_room)
            thread.start()
        ended = process.wait()
        if room_soon:
            thread.join()
        wrong, run = ended.wrong(0, 1, 2), folder / "runs" / "base"
        wrong += _last_is_good(bench, run)
        resize(folder, LARGE)
        if ended.status != 0:
            wrong += bench.run("base", "base", **places).wrong(0)
        wrong += bench.ended_well("base", run) if run.exists() else ["there is no run"]
    when = "room after 2 s" if room_soon else "room after the end"
    return Row(
        "disk",
        f"tmpfs full at {share:.0%} of a run, {when}",
        tuple(wrong),
        f"status {ended.status} in {process.phase}",
    )


def _full_by_limit(bench: Bench) -> Row:
    """No file may grow beyond a limit, which looks much like a full disk."""
    limit = bench.rng.randrange(1, 40_000)
    setup = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    name = bench.new_name("base")
    run, cache = bench.folder / "runs" / name, bench.folder / f"cache-{name}"
    ended = bench.run("base", name, *patience(), cache=cache, setup=setup)
    wrong = ended.wrong(0, 1, 2) + _last_is_good(bench, run)
    if ended.status != 0:
        wrong += bench.run("base", name, cache=cache).wrong(0)
    wrong += bench.ended_well("base", run)
    return Row("disk", f"files of at most {limit:,} bytes", tuple(wrong), f"status {ended.status}")


def _last_is_good(bench: Bench, run: Path) -> list[str]:
    """Whether the newest checkpoint of a run, if it has any, loads without a warning."""
    if not any((run / "checkpoints").glob("*/SHA256SUMS")):
        return []
    answer = bench.ask(what="model", path=str(run))
    if "error" in answer:
        return [f"the last checkpoint: {answer['error'][:200]}"]
    return [f"the last checkpoint: {text[:200]}" for text in answer["warnings"]]


def _read_only(bench: Bench) -> Row:
    """The disk is mounted read-only when a run wants to go on."""
    with small_disk(bench) as folder:
        places: Any = {"cwd": folder, "cache": folder / "cache"}
        process = bench.start("base", "base", **places)
        process.wait_until(lambda: (folder / "runs/base/checkpoints/8/SHA256SUMS").exists())
        process.send(signal.SIGKILL)
        process.wait()
        run = folder / "runs" / "base"
        _mount("-o", "remount,ro", str(folder))
        wrong = bench.run("base", "base", **places).wrong(1, 2)
        wrong += _last_is_good(bench, run)
        _mount("-o", "remount,rw", str(folder))
        wrong += bench.run("base", "base", **places).wrong(0) + bench.ended_well("base", run)
    return Row("disk", "read-only when the run goes on", tuple(wrong))


def _rename(run: Path) -> None:
    os.rename(run, run.with_name(f"{run.name}-moved"))


def _lost_folder(bench: Bench, what: str, lose: Callable[[Path], None]) -> Row:
    """The run's folder is deleted or renamed while the run trains."""
    name = bench.new_name("base")
    run = bench.folder / "runs" / name
    process = bench.start("base", name, *patience(), "--train.steps", "1000000")
    process.wait_until(lambda: (run / "checkpoints" / "8" / "SHA256SUMS").exists())
    for _ in range(99):  # while the run writes to it
        try:
            lose(run)
            break
        except OSError:
            time.sleep(0.01)
    process.wait_until(lambda: False, 20)
    note = "ended by itself"
    if process.runs:
        note = "went on until SIGTERM"
        process.send(signal.SIGTERM)
    ended = process.wait(60)
    wrong = ended.wrong(1, 2, 143)
    for left in (run, run.with_name(f"{run.name}-moved")):
        wrong += _last_is_good(bench, left)
    return Row("disk", f"the run's folder is {what} while it trains", tuple(wrong), note)
