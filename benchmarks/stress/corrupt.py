"""Damaged data files of every format: each is read, or refused with an error that names it."""

import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from .runs import Bench, Row

RECORDS = [
    {
        "text": f'She said: "héllo {n}",\tand {"went, " * (n % 7)}on.',
        "label": ("ham", "spam")[n % 2],
    }
    for n in range(60)
]


def _table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "label"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


def _lines() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def _parquet(compression: str, nested: bool = False) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {**record, "messages": [{"role": "user", "content": record["text"]}] * 2}
        if nested
        else record
        for record in RECORDS
    ]
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file, compression=compression, row_group_size=25)
    return file.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.txt": lambda: "\n".join(record["text"] for record in RECORDS).encode(),
    "utf16.txt": lambda: "\n".join(record["text"] for record in RECORDS).encode("utf-16"),
    "a.csv": lambda: _table(","),
    "semicolons.csv": lambda: _table(";"),
    "quoted.tsv": lambda: _table("\t"),
    "raw.tsv": lambda: b"text\tlabel\n" + b'"so" it is\tham\nso "it\tspam\n' * 20,
    "a.json": lambda: json.dumps(RECORDS, indent=1).encode(),
    "a.jsonl": _lines,
    "a.jsonl.gz": lambda: gzip.compress(_lines(), mtime=0),
    "a.csv.gz": lambda: gzip.compress(_table(","), mtime=0),
    "snappy.parquet": lambda: _parquet("snappy"),
    "plain.parquet": lambda: _parquet("none"),
    "nested.parquet": lambda: _parquet("zstd", nested=True),
}
"""Intact files by name."""

ODD = (b"\0", b"\xff", b'"', b"\n", b"\r", b",", b"\t", b"[" * 300, b'{"a":' * 300, b"\xef\xbb\xbf")
ODD += (b"\xff\xfe", b"\\ud800", b"1e400", b"NaN", b"null", b"9" * 5000, b"\x1f\x8b", b"PAR1")
"""Bytes that are inserted into files."""

Edit = tuple[str, float, int, int]
"""A kind of damage, its place as a fraction of the file, its size in bytes, and a random number."""


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Returns the bytes of a file after some damage."""
    for kind, place, size, number in edits:
        start = int(place * len(content))
        before, cut, after = content[:start], content[start : start + size], content[start + size :]
        match kind:
            case "flip":
                flipped = bytes([cut[0] ^ 1 << number % 8]) + cut[1:] if cut else cut
                content = before + flipped + after
            case "cut off":
                content = before
            case "delete":
                content = before + after
            case "repeat":
                content = before + cut * (1 + number % 50) + after
            case "insert":
                content = before + ODD[number % len(ODD)] + cut + after
            case "noise":
                content = before + random.Random(number).randbytes(len(cut)) + after
            case "zeros":
                content = before + bytes(len(cut)) + after
    return content


KINDS = ("flip", "cut off", "delete", "repeat", "insert", "noise", "zeros")
LARGEST_EDIT = 200


def rows(bench: Bench, files: int) -> Iterator[Row]:
    """Reads damaged files as text and as records; `files` is their number, over all formats."""
    for name, make in FORMATS.items():
        content, path = make(), bench.folder / name
        outcomes: Counter[str] = Counter()
        wrong: list[str] = []
        for turn in range(-(-files // len(FORMATS))):
            edits = [
                (
                    bench.rng.choice(KINDS),
                    bench.rng.random(),
                    bench.rng.randrange(1, LARGEST_EDIT),
                    bench.rng.randrange(1 << 30),
                )
                for _ in range(bench.rng.choice((1, 1, 2, 5)) if turn else 0)  # the first is intact
            ]
            path.write_bytes(edited(content, edits))
            for what in ("documents",) if name.endswith(".txt") else ("documents", "records"):
                answer = bench.ask(what=what, path=str(path))
                error = answer.get("error", "")
                named = bool(answer.get("clear")) and Path(path).name in error
                outcomes["refused" if named else "UNCLEAR" if error else "read"] += 1
                if error and (not named or not turn):
                    wrong.append(f"{what} after {edits}: {error[:300]}")
        note = f"{outcomes['read']} read, {outcomes['refused']} refused"
        yield Row("data", name, tuple(wrong[:5]), note)
