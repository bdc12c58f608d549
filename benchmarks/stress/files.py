"""Faults of files: flipped bits, truncated and deleted files, and files of other programs."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .runs import STEPS, Bench, Row

STRAY = (".DS_Store", "x~", ".nfs000", "._a")
HALF = 16  # the last checkpoint of a run before it resumes


def flip(file: Path, rng: random.Random) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    """Truncates a file at a random place."""
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def delete(file: Path, rng: random.Random) -> None:
    """Deletes a file."""
    file.unlink()


HARMS: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flips": flip,
    "truncations": truncate,
    "deletions": delete,
}


def some_file(folder: Path, rng: random.Random) -> Path:
    """Returns a random file in a folder or its subfolders that is not empty."""
    return rng.choice([f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size])


def export(bench: Bench) -> Path:
    """Exports the reference run of `base` in Hugging Face's layout."""
    bench.reference("base")
    if not (bench.folder / "hf").exists():
        answer = bench.ask(what="export", path="runs/base", folder="hf")
        if "error" in answer:
            raise SystemExit(f"the export fails: {answer['error']}")
    return bench.folder / "hf"


def rot(bench: Bench, flips: int, truncations: int, deletions: int, resumes: int) -> Iterator[Row]:
    """Damages one file at a time: the right values are loaded, or an error names the damage."""
    for harm, number in zip(HARMS, (flips, truncations, deletions), strict=True):
        for what in ("checkpoint", "tokens", "export"):
            if number:
                yield load_damaged(bench, what, harm, number)
    for turn in range(resumes):
        yield resume_damaged(bench, turn)


def load_damaged(bench: Bench, what: str, harm: str, number: int) -> Row:
    """Damages a file of a fresh copy, loads the copy, repeats this, and counts the outcomes."""
    bench.reference("base")
    rotten, intact, older = bench.folder / "rotten", None, None
    if what == "checkpoint":
        source, copy, place = bench.folder / "runs" / "base", rotten, f"checkpoints/{STEPS}"
        request = {"what": "model", "path": str(rotten)}
        before = source / "checkpoints" / str(STEPS - 4)
        older = bench.ask(what="model", path=str(before))["values"]
    elif what == "tokens":
        source, copy, place = bench.cache / "tokens", rotten / "tokens", ""
        request = {"what": "tokens", "path": "base.json", "cache": str(rotten)}
    else:
        source, copy, place = export(bench), rotten, ""
        request = {"what": "model", "path": str(rotten)}

    outcomes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for turn in range(number + 1):  # the first time nothing is damaged
        shutil.rmtree(rotten, ignore_errors=True)
        shutil.copytree(source, copy)
        if turn == 0:
            intact = bench.ask(**request)["values"]
            continue
        file = some_file(copy / place, bench.rng)
        HARMS[harm](file, bench.rng)
        answer = bench.ask(**request)
        values, warned = answer.get("values"), bool(answer["warnings"])
        if what == "checkpoint" and _steps(copy) != _steps(source):
            outcome = "A CHECKPOINT WAS DELETED"
        elif "error" in answer:
            outcome = "refused" if answer["clear"] else f"TRACEBACK {answer['error'][:80]}"
        elif values == intact:
            outcome = "right"
        elif values == older:
            outcome = "older, with a warning" if warned else "older, WITHOUT A WARNING"
        else:
            outcome = "SILENTLY WRONG"
        outcomes[outcome] += 1
        examples.setdefault(outcome, str(file.relative_to(copy)))
    fine = ("right", "older, with a warning", "refused")
    wrong = [f"{n} {name} ({examples[name]})" for name, n in outcomes.items() if name not in fine]
    note = ", ".join(f"{outcomes[name]} {name}" for name in fine if outcomes[name])
    return Row("rot", f"{number} {harm}: {what}", tuple(wrong), note)


def _steps(run: Path) -> set[str]:
    """Returns the steps of a run's checkpoints; the step of a renamed one, `24.damaged`, is 24."""
    return {path.name.split(".")[0] for path in (run / "checkpoints").iterdir()}


def half_done(bench: Bench, name: str) -> Path:
    """Copies the reference run without the checkpoints after step HALF."""
    bench.reference("base")
    run = bench.folder / "runs" / name
    shutil.copytree(bench.folder / "runs" / "base", run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name) > HALF:
            shutil.rmtree(folder)
    return run


def resume_damaged(bench: Bench, turn: int) -> Row:
    """Resumes a run whose newest checkpoint or cached tokens are damaged."""
    harm = list(HARMS)[turn % len(HARMS)]
    name = bench.new_name("base")
    run, cache = half_done(bench, name), bench.folder / "rotten"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(bench.cache, cache)
    place = cache / "tokens" if turn % 4 == 3 else run / "checkpoints" / str(HALF)
    file, before = some_file(place, bench.rng), _steps(run)
    HARMS[harm](file, bench.rng)
    ended = bench.run("base", name, cache=cache)
    wrong = ended.wrong(0, 2)
    if ended.status == 0:
        wrong += bench.differences_from_reference("base", run)
    wrong += [f"step {step} is gone" for step in sorted(before - _steps(run))]
    label = f"resume, {harm[:-1]} in {'tokens' if turn % 4 == 3 else 'the checkpoint'}"
    where = file.relative_to(place)
    return Row("rot", label, tuple(wrong), f"status {ended.status}, {where}")


def stray(bench: Bench, names: Sequence[str] = STRAY) -> Iterator[Row]:
    """Adds files of other programs to every folder: everything works, and nothing is deleted."""
    bench.reference("base")
    intact = bench.ask(what="model", path="runs/base")["values"]
    for stray_name in names:
        name = bench.new_name("base")
        run = half_done(bench, name)
        before = {path.name for path in (run / "checkpoints").iterdir()}
        hf, cache = bench.folder / "rotten-hf", bench.folder / "rotten"
        for source, copy in ((export(bench), hf), (bench.cache, cache)):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
        (entry,) = (p for p in (cache / "tokens").iterdir() if p.is_dir())
        inode = entry.stat().st_ino
        strays = []
        for root in (run, hf, cache):
            for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
                strays.append(folder / stray_name)
                strays[-1].write_bytes(b"\0stray")
        wrong = []
        answer = bench.ask(what="model", path=str(hf))
        exported = bench.ask(what="model", path=str(export(bench)))
        if answer.get("values") != exported["values"]:
            wrong.append(f"the export: {answer.get('error', 'other values')}")
        answer = bench.ask(what="model", path=str(run))
        if answer["warnings"] or "error" in answer:
            wrong.append(f"loading: {answer.get('error') or answer['warnings'][0]}")
        ended = bench.run("base", name, cache=cache)
        wrong += ended.wrong(0) + bench.differences_from_reference("base", run)
        if f"resumed after step {HALF}" not in ended.out:
            wrong.append(f"it did not resume after step {HALF}")
        answer = bench.ask(what="model", path=str(run))
        if answer.get("values") != intact:
            wrong.append(f"the result: {answer.get('error', 'other values')}")
        gone = before - {path.name for path in (run / "checkpoints").iterdir()}
        wrong += [f"checkpoint {step} was deleted" for step in sorted(gone)]
        missing = [path for path in strays if not path.exists()]
        if missing:
            where = missing[0].relative_to(bench.folder)
            wrong.append(f"{len(missing)} of {len(strays)} files deleted, such as {where}")
        if not entry.exists() or entry.stat().st_ino != inode:
            wrong.append("the cache entry was made again")
        yield Row("stray", stray_name, tuple(wrong), f"{len(strays)} files")
