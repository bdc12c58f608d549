"""What happens to files: flipped bits, cut and deleted files, and files of other programs."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.torture.runs import STEPS, Bench, Row

STRAY = (".DS_Store", "x~", ".nfs000", "._a")
HALF = 16  # the step after which a resumed run goes on


def flip(file: Path, rng: random.Random) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, rng: random.Random) -> None:
    """Cuts a file short."""
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
    """A file under a folder that has at least a byte."""
    return rng.choice([f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size])


def export(bench: Bench) -> Path:
    """The reference run of `base` in the layout of Hugging Face."""
    bench.reference("base")
    if not (bench.folder / "hf").exists():
        answer = bench.ask(what="export", path="runs/base", folder="hf")
        if "error" in answer:
            raise SystemExit(f"the export fails: {answer['error']}")
    return bench.folder / "hf"


def rot(
    bench: Bench, flips: int, truncations: int, deletions: int, resumes: int = 9
) -> Iterator[Row]:
    """One damaged file at a time: the right values are loaded, or a clear error is raised."""
    numbers = dict(zip(HARMS, (flips, truncations, deletions), strict=True))
    for harm, number in numbers.items():
        yield _rot_checkpoint(bench, harm, number)
        yield _rot_tokens(bench, harm, number)
        yield _rot_export(bench, harm, number)
    if resumes:
        yield from _rot_resume(bench, resumes)


def _rot_checkpoint(bench: Bench, harm: str, number: int) -> Row:
    """The newest checkpoint of a run that is loaded."""
    bench.reference("base")
    source, copy = bench.folder / "runs" / "base", bench.folder / "rotten"
    older = bench.ask(what="model", path=str(source / "checkpoints" / str(STEPS - 4)))["values"]

    def judge(values: Any, warnings: list[str]) -> str:
        steps = {path.name.split(".")[0] for path in (copy / "checkpoints").iterdir()}
        if steps != {path.name for path in (source / "checkpoints").iterdir()}:
            return "a checkpoint was deleted"
        if values == older:
            return "older, with a warning" if warnings else "older, WITHOUT A WARNING"
        return "" if values is None else "SILENTLY WRONG"

    place = copy / "checkpoints" / str(STEPS)
    request = {"what": "model", "path": str(copy)}
    return _rot(bench, "checkpoint", source, copy, place, request, harm, number, judge)


def _rot_tokens(bench: Bench, harm: str, number: int) -> Row:
    """The cached tokens of a text."""
    bench.reference("base")
    source, copy = bench.cache / "tokens", bench.folder / "rotten" / "tokens"
    request = {"what": "tokens", "path": "base.json", "cache": str(copy.parent)}
    return _rot(bench, "tokens", source, copy, copy, request, harm, number, _nothing_else)


def _rot_export(bench: Bench, harm: str, number: int) -> Row:
    """A model in the layout of Hugging Face."""
    source, copy = export(bench), bench.folder / "rotten"
    request = {"what": "model", "path": str(copy)}
    return _rot(bench, "export", source, copy, copy, request, harm, number, _nothing_else)


def _nothing_else(values: Any, warnings: list[str]) -> str:
    return "" if values is None else "SILENTLY WRONG"


def _rot(
    bench: Bench,
    name: str,
    source: Path,
    copy: Path,
    place: Path,
    request: dict[str, Any],
    harm: str,
    number: int,
    judge: Callable[[Any, list[str]], str],
) -> Row:
    """Harms a file under `place` of a fresh copy of `source`, loads it, and counts the outcomes.

    `judge` names the outcome for values that are not the intact ones, or None where none were
    loaded; empty if nothing is wrong.
    """
    outcomes: Counter[str] = Counter()
    examples: dict[str, str] = {}
    intact = None
    for turn in range(number + 1):  # the first time nothing is harmed
        shutil.rmtree(bench.folder / "rotten", ignore_errors=True)
        shutil.copytree(source, copy)
        file = None
        if turn:
            file = some_file(place, bench.rng)
            HARMS[harm](file, bench.rng)
        answer = bench.ask(**request)
        values = answer.get("values")
        if not turn:
            intact = values
            continue
        if values is not None and values == intact:
            outcome = judge(None, []) or "right"
        elif values is not None:
            outcome = judge(values, answer["warnings"])
        elif not answer["clear"]:
            outcome = f"TRACEBACK: {answer['error'][:100]}"
        else:
            outcome = judge(None, []) or "refused"
        outcomes[outcome] += 1
        examples.setdefault(outcome, str(file and file.relative_to(copy)))
    fine = {"right", "refused", "older, with a warning"}
    wrong = [f"{n} {what} ({examples[what]})" for what, n in outcomes.items() if what not in fine]
    note = ", ".join(f"{n} {what}" for what, n in outcomes.items() if what in fine)
    return Row("rot", f"{number} {harm}: {name}", tuple(wrong), note)


def half_done(bench: Bench, name: str) -> Path:
    """A copy of the reference run as it was after step HALF."""
    bench.reference("base")
    run = bench.folder / "runs" / name
    shutil.copytree(bench.folder / "runs" / "base", run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name) > HALF:
            shutil.rmtree(folder)
    return run


def _rot_resume(bench: Bench, number: int) -> Iterator[Row]:
    """A run whose newest checkpoint, or cached text, is damaged, and that goes on training."""
    for turn in range(number):
        harm = list(HARMS)[turn % len(HARMS)]
        name = bench.new_name("base")
        run = half_done(bench, name)
        cache = bench.folder / "rotten"
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(bench.cache, cache)
        place = cache / "tokens" if turn % 3 == 2 else run / "checkpoints" / str(HALF)
        file = some_file(place, bench.rng)
        HARMS[harm](file, bench.rng)
        ended = bench.run("base", name, cache=cache)
        wrong = ended.wrong(0, 2)
        if ended.status == 0:
            wrong += bench.ended_well("base", run)
        kept = {path.name.split(".")[0] for path in (run / "checkpoints").iterdir()}
        wrong += [f"step {step} is gone" for step in range(4, HALF + 1, 4) if str(step) not in kept]
        label = f"resume, {harm[:-1]} of {file.relative_to(place).parts[0]}"
        yield Row("rot", label, tuple(wrong), f"status {ended.status}")


def stray(bench: Bench) -> Iterator[Row]:
    """Files of other programs in every folder: everything works, and nothing is deleted."""
    bench.reference("base")
    intact = bench.ask(what="model", path="runs/base")["values"]
    for stray_name in STRAY:
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
        wrong += ended.wrong(0) + bench.ended_well("base", run)
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
