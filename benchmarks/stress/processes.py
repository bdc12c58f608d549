"""Faults of processes: SIGKILL, SIGTERM, Ctrl-C, a second start, and losses that explode."""

import dataclasses
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from .runs import CONFIGS, STEPS, Bench, Done, Process, Row

LONGEST_END = 10.0  # seconds from a signal to the end of the process


def wait_for_moment(bench: Bench, process: Process, run: Path, objective: str) -> bool:
    """Waits for a random moment of a run; returns False if the run ended before it.

    Half of the moments are spread evenly over the run's duration. The others are in short phases
    that these would seldom hit: while a checkpoint is written, and at the end.
    """
    kind = bench.rng.choice(["any", "any", "saving", "end"])
    delay = bench.rng.uniform(0, 1)
    if kind == "any":
        return (
            not process.wait_until(lambda: False, delay * bench.duration(objective))
            and process.runs
        )
    if kind == "saving":
        saved = bench.rng.randrange(5)  # the number of checkpoints before that moment

        def arrived() -> bool:
            folder = run / "checkpoints"
            return folder.is_dir() and sum(1 for _ in folder.iterdir()) > saved

        delay *= 0.1
    else:

        def arrived() -> bool:
            return process.phase == "end"

    return process.wait_until(arrived) and (time.sleep(delay) or process.runs)


def kills(bench: Bench, number: int, objectives: list[str] | None = None) -> Iterator[Row]:
    """Kills runs at random moments (SIGKILL); the same command, repeated, ends bit-equal.

    `number` runs of each objective are killed, once or twice each.
    """
    objectives = objectives or list(CONFIGS)
    for objective in objectives * number:
        bench.reference(objective)
        for _ in range(9):  # until a kill comes in time
            row = _kill(bench, objective)
            if row is not None:
                yield row
                break


def _kill(bench: Bench, objective: str) -> Row | None:
    """Kills a run once or twice; returns None if it ended before that."""
    name = bench.new_name(objective)
    run = bench.folder / "runs" / name
    # Half of the runs have no token cache, so that they may be killed while they tokenize.
    cache = bench.folder / f"cache-{name}" if bench.rng.random() < 0.5 else bench.cache
    phases, wrong = [], []
    for _ in range(bench.rng.choice([1, 1, 2])):
        process = bench.start(objective, name, cache=cache)
        if wait_for_moment(bench, process, run, objective):
            phases.append(process.phase)
            process.send(signal.SIGKILL)
        ended = process.wait()
        if "Traceback" in ended.err:
            wrong += ended.wrong(0, 137)
    if not phases:
        return None
    wrong += bench.run(objective, name, cache=cache).wrong(0)
    wrong += bench.differences_from_reference(objective, run)
    shutil.rmtree(run)
    return Row("kills", f"{objective}: {' and '.join(phases)}", tuple(wrong))


def signals(bench: Bench, number: int, objectives: list[str] | None = None) -> Iterator[Row]:
    """SIGTERM and SIGINT at random moments end a run soon; the same command resumes bit-equal.

    Every fourth run gets the signal twice, which ends it immediately.
    """
    objectives = objectives or ["base", "classify", "grpo", "translate"]
    for turn in range(number):
        objective = objectives[turn % len(objectives)]
        name, which = bench.new_name(objective), (signal.SIGTERM, signal.SIGINT)[turn // 2 % 2]
        run = bench.folder / "runs" / name
        bench.reference(objective)
        for _ in range(9):  # until a signal comes in time
            process = bench.start(objective, name)
            if wait_for_moment(bench, process, run, objective):
                break
            process.wait()
            name = bench.new_name(objective)
            run = bench.folder / "runs" / name
        phase, began = process.phase, time.monotonic()
        process.send(which)
        twice = turn % 4 == 3
        if twice:
            time.sleep(0.05)
            process.send(which)
        ended = process.wait()
        took = time.monotonic() - began
        wrong = ended.wrong(128 + which)
        if took > LONGEST_END:
            wrong.append(f"it took {took:.1f} s")
        wrong += bench.run(objective, name).wrong(0)
        wrong += bench.differences_from_reference(objective, run)
        label = f"{objective}: {which.name}{' twice' if twice else ''} in {phase}"
        yield Row("signals", label, tuple(wrong), f"{took:.1f} s")


def two_starts(bench: Bench, number: int) -> Iterator[Row]:
    """Starts a command twice: the first run ends as if alone, the second start is refused."""
    expected = bench.reference("base")
    duration = bench.duration("base")
    for turn in range(number):
        name = bench.new_name("base")
        kind = ("at once", "later", "later, with another seed")[turn % 3]
        first = bench.start("base", name)
        if kind == "at once":
            time.sleep(bench.rng.uniform(0, 0.2))
        else:
            first.wait_until(lambda: False, bench.rng.uniform(0.2, 0.5) * duration)
        second = bench.start("base", name, *(["--seed", "7"] if "seed" in kind else []))
        ends = [first.wait(), second.wait()]
        if kind == "at once":  # either may be the first to lock the folder
            ends.sort(key=lambda end: end.status != 0)
        wrong = [f"first: {each}" for each in ends[0].wrong(0)]
        wrong += [f"second: {each}" for each in _refused(ends[1])]
        wrong += bench.differences_from_reference("base", bench.folder / "runs" / name)
        yield Row("two starts", kind, tuple(wrong), f"{len(expected)} arrays and records")


def _refused(ended: Done) -> list[str]:
    lines = ended.err.strip().splitlines()
    if ended.status == 2 and len(lines) != 1:
        return [f"{len(lines)} lines of error: {lines[:2]}"]
    return ended.wrong(2)


def nan(bench: Bench) -> Iterator[Row]:
    """Losses that explode end a run with an error whose advice works."""
    broken = ("--optim.learning_rate", "1e30")
    name = bench.new_name("base")
    run = bench.folder / "runs" / name
    ended = bench.run("base", name, *broken)
    wrong = ended.wrong(1)
    wrong += [] if "finite" in ended.err else ["the message does not say what is not finite"]
    yield Row("nan", "from the first step", tuple(wrong))

    bench.reference("base")
    name = bench.new_name("base")
    run = bench.folder / "runs" / name
    wrong = bench.run("base", name, "--train.steps", "8").wrong(0)
    ended = bench.run("base", name, *broken)
    wrong += ended.wrong(1)
    saved = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    if not re.search(rf"\b{saved[-1]}\b", ended.err):
        wrong.append(f"the message does not name step {saved[-1]}: {ended.err.strip()[:200]}")
    yield Row("nan", "after a good checkpoint", tuple(wrong))

    yield from _go_back(bench, run, name)


def _go_back(bench: Bench, run: Path, name: str) -> Iterator[Row]:
    """`--resume STEP` resumes from an earlier checkpoint and renames the later ones."""
    wrong = bench.run("base", name, "--resume", "4").wrong(0)
    wrong += [f"{step}.abandoned is missing" for step in (8,) if not _abandoned(run, step)]
    wrong += _finite(run)
    yield Row("nan", "going back after a loss that is not finite", tuple(wrong))

    name = bench.new_name("base")
    run = bench.folder / "runs" / name
    wrong = bench.run("base", name).wrong(0)
    wrong += bench.run("base", name, "--resume", "8").wrong(0)
    wrong += bench.differences_from_reference("base", run)
    later = range(12, STEPS + 1, 4)
    wrong += [f"{step}.abandoned is missing" for step in later if not _abandoned(run, step)]
    if not (run / "metrics.abandoned.jsonl").exists():
        wrong.append("metrics.abandoned.jsonl is missing")
    yield Row("nan", "going back from the end, bit-equal", tuple(wrong))


def _abandoned(run: Path, step: int) -> bool:
    return any((run / "checkpoints").glob(f"{step}.abandoned*"))


def _finite(run: Path) -> list[str]:
    """Returns what is wrong if a run lacks a finite loss at one of its steps."""
    losses = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            losses[record["step"]] = record["loss"]
    missing = [step for step in range(1, STEPS + 1) if losses.get(step) is None]
    return [f"no finite loss at steps {missing}"] if missing else []


def has_option(part: type, name: str) -> bool:
    """Returns whether a dataclass of the config has an option."""
    return name in {field.name for field in dataclasses.fields(part)}
