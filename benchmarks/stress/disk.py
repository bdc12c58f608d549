"""Faults of the disk: it is full or read-only, or the run's folder disappears."""

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
PATIENCE = 0.1  # minutes that a run waits for space on the disk


@contextmanager
def small_disk(bench: Bench, size: int = LARGE) -> Iterator[Path]:
    """Mounts a small disk with the input files of runs. Raises OSError if it cannot be mounted."""
    folder = bench.folder / "disk"
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        bench.write_inputs(folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    """Changes the size of a small disk."""
    _mount("-o", f"remount,size={size}", str(folder))


def _mount(*options: str) -> None:
    try:
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(str(error)) from None
    if done.returncode:
        raise OSError(done.stderr.strip())


def used(folder: Path) -> int:
    """Returns the number of bytes in use on the disk of a folder."""
    return shutil.disk_usage(folder).used


def disk(bench: Bench, number: int) -> Iterator[Row]:
    """Runs on a full or read-only disk, or without their folder, end with an error and resume."""
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
            yield _full(bench, size, share, space_soon=turn % 2 == 1)
        yield _read_only(bench)
    for what, lose in (("deleted", shutil.rmtree), ("renamed", _rename)):
        yield _lost_folder(bench, what, lose)


def patience() -> list[str]:
    """Returns the option with which a run waits only a few seconds for space on the disk."""
    known = has_option(CheckpointConfig, "patience")
    return ["--checkpoint.patience", str(PATIENCE)] if known else []


def _full(bench: Bench, size: int, share: float, space_soon: bool) -> Row:
    """Fills the disk; there is space again after two seconds, or only after the run has ended."""
    with small_disk(bench, size) as folder:
        places: Any = {"cwd": folder, "cache": folder / "cache"}
        process = bench.start("base", "base", *patience(), **places)
        if space_soon:

            def make_space() -> None:
                if process.wait_until(lambda: size - used(folder) < 16_384):
                    time.sleep(2)
                    resize(folder, LARGE)

            thread = threading.Thread(target=make_space)
            thread.start()
        ended = process.wait()
        if space_soon:
            thread.join()
        wrong, run = ended.wrong(0, 1, 2), folder / "runs" / "base"
        wrong += _last_checkpoint_errors(bench, run)
        resize(folder, LARGE)
        if ended.status != 0:
            wrong += bench.run("base", "base", **places).wrong(0)
        wrong += (
            bench.differences_from_reference("base", run) if run.exists() else ["there is no run"]
        )
    when = "space after 2 s" if space_soon else "space after the end"
    return Row(
        "disk",
        f"tmpfs full at {share:.0%} of a run, {when}",
        tuple(wrong),
        f"status {ended.status} in {process.phase}",
    )


def _full_by_limit(bench: Bench) -> Row:
    """Limits the size of every file, which for a run is much like a full disk."""
    limit = bench.rng.randrange(1, 40_000)
    setup = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    name = bench.new_name("base")
    run, cache = bench.folder / "runs" / name, bench.folder / f"cache-{name}"
    ended = bench.run("base", name, *patience(), cache=cache, setup=setup)
    wrong = ended.wrong(0, 1, 2) + _last_checkpoint_errors(bench, run)
    if ended.status != 0:
        wrong += bench.run("base", name, cache=cache).wrong(0)
    wrong += bench.differences_from_reference("base", run)
    return Row("disk", f"files of at most {limit:,} bytes", tuple(wrong), f"status {ended.status}")


def _last_checkpoint_errors(bench: Bench, run: Path) -> list[str]:
    """Returns what is wrong if the newest checkpoint, if any, does not load without a warning."""
    if not any((run / "checkpoints").glob("*/SHA256SUMS")):
        return []
    answer = bench.ask(what="model", path=str(run))
    if "error" in answer:
        return [f"the last checkpoint: {answer['error'][:200]}"]
    return [f"the last checkpoint: {text[:200]}" for text in answer["warnings"]]


def _read_only(bench: Bench) -> Row:
    """Mounts the disk read-only before a run resumes."""
    with small_disk(bench) as folder:
        places: Any = {"cwd": folder, "cache": folder / "cache"}
        process = bench.start("base", "base", **places)
        process.wait_until(lambda: (folder / "runs/base/checkpoints/8/SHA256SUMS").exists())
        process.send(signal.SIGKILL)
        process.wait()
        run = folder / "runs" / "base"
        _mount("-o", "remount,ro", str(folder))
        wrong = bench.run("base", "base", **places).wrong(1, 2)
        wrong += _last_checkpoint_errors(bench, run)
        _mount("-o", "remount,rw", str(folder))
        wrong += bench.run("base", "base", **places).wrong(0) + bench.differences_from_reference(
            "base", run
        )
    return Row("disk", "read-only when the run resumes", tuple(wrong))


def _rename(run: Path) -> None:
    os.rename(run, run.with_name(f"{run.name}-moved"))


def _lost_folder(bench: Bench, what: str, lose: Callable[[Path], None]) -> Row:
    """Deletes or renames the run's folder while the run trains."""
    name = bench.new_name("base")
    run = bench.folder / "runs" / name
    process = bench.start("base", name, *patience(), "--train.steps", "1000000")
    process.wait_until(lambda: (run / "checkpoints" / "8" / "SHA256SUMS").exists())
    for _ in range(99):  # repeated, because the run writes to it
        try:
            lose(run)
            break
        except OSError:
            time.sleep(0.01)
    process.wait_until(lambda: False, 20)
    note = "ended by itself"
    if process.runs:
        note = "trained until SIGTERM"
        process.send(signal.SIGTERM)
    ended = process.wait(60)
    wrong = ended.wrong(1, 2, 143)
    for left in (run, run.with_name(f"{run.name}-moved")):
        wrong += _last_checkpoint_errors(bench, left)
    return Row("disk", f"the run's folder is {what} while it trains", tuple(wrong), note)
