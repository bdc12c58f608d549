"""A stress test of the promise that no run is lost; exits with 0 only if every row passes.

    python benchmarks/torture.py                              # everything, about two hours
    python benchmarks/torture.py --only kills --kills 5
    python benchmarks/torture.py --only rot stray --flips 30
    python benchmarks/torture.py --only data --damaged 2000

| section | what it does | what must hold |
|---|---|---|
| kills | SIGKILL at random moments, every objective | the same command ends bit-equal |
| rot | flips bits, cuts and deletes files, one at a time | the right values or a clear error |
| stray | files of other programs in every folder | everything works, nothing is deleted |
| data | damaged files of text and records, in every format | read, or an error that names them |
| disk | full or read-only disk, the run's folder disappears | a clear error, and nothing is lost |
| starts | the same command twice at a time | one run, bit-equal, and one refusal |
| signals | SIGTERM and Ctrl-C, once and twice, at any moment | 143 or 130 soon; then bit-equal |
| nan | losses that explode | an error that names the checkpoint; going back works |

Runs take 24 steps of a tiny model and are started as processes of `train.py` in a temporary folder.
Bit-equal means every array of the last checkpoint and every record of metrics.jsonl, compared with
those of an undisturbed run. Apart from the speed of the machine, randomness comes from `--seed`.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import tyro
from stress import corrupt, disk, files, processes
from stress.runs import CONFIGS, Bench, Row

Section = Literal["kills", "rot", "stray", "data", "disk", "starts", "signals", "nan"]


def main(
    only: tuple[Section, ...] = (),
    objectives: tuple[str, ...] = (),
    kills: int = 20,
    flips: int = 300,
    truncations: int = 50,
    deletions: int = 50,
    resumes: int = 12,
    damaged: int = 500,
    disks: int = 8,
    starts: int = 20,
    signals: int = 50,
    seed: int = 0,
) -> int:
    """Tortures runs.

    Args:
        only: The sections to run; by default all.
        objectives: The objectives whose runs are killed and get signals; by default all.
        kills: Runs of each objective that are killed.
        flips: Bits flipped in each kind of file.
        truncations: Files cut short, of each kind.
        deletions: Files deleted, of each kind.
        resumes: Damaged runs that are resumed.
        damaged: Damaged files of data.
        disks: Runs on a disk that fills up.
        starts: Runs started twice.
        signals: Runs that get SIGTERM or SIGINT.
        seed: Of everything random.
    """
    chosen = list(objectives) or list(CONFIGS)
    sections: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "kills": lambda bench: processes.kills(bench, kills, chosen),
        "rot": lambda bench: files.rot(bench, flips, truncations, deletions, resumes),
        "stray": files.stray,
        "data": lambda bench: corrupt.rows(bench, damaged),
        "disk": lambda bench: disk.disk(bench, disks),
        "starts": lambda bench: processes.two_starts(bench, starts),
        "signals": lambda bench: processes.signals(bench, signals, chosen),
        "nan": processes.nan,
    }
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jaxgpt-torture-") as folder:
        bench = Bench(Path(folder), seed)
        for name, section in sections.items():
            if only and name not in only:
                continue
            bench.rng.seed(f"{seed} {name}")  # a section alone does what it does among the others
            for row in section(bench):
                print(row.text, flush=True)
                rows.append(row)
        bench.close()
    print(f"\n{'section':<12} {'rows':>6} {'failed':>7}")
    for name in dict.fromkeys(row.section for row in rows):
        these = [row for row in rows if row.section == name]
        print(f"{name:<12} {len(these):>6} {sum(bool(row.failures) for row in these):>7}")
    failed = [row for row in rows if row.failures]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} pass in {time.monotonic() - began:.0f} s")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
