"""Records: pieces of data with named fields, read from files, and held out by their content.

A path of records is a table (`.csv`, `.tsv`, `.parquet`), objects (`.json`, `.jsonl`), a TFDS data
set (`tfds:NAME`, as for text), parallel text (`data/train`, for `data/train.en` and
`data/train.de`, line by line), or one of the sets that are made here (see `made`).
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgpt import strict_json
from jaxgpt.data.formats import VALUE_BYTES, as_text, json_lines, parquet_rows, reading
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

LARGEST_RECORDS = 1 << 32
"""Bytes of memory for the records of one file, which are all in memory: 4 GiB."""
LARGEST_JSON = 1 << 28
"""Bytes of a .json file, which is parsed as a whole: 256 MiB."""


@dataclass(frozen=True)
class RecordsConfig:
    """Which records are trained on, and how rows are made of them."""

    paths: tuple[str, ...] = ()
    """Each a file (.csv, .tsv, .json, .jsonl, .parquet), the beginning of parallel files' names
    (data/train for data/train.en and data/train.de), 'tfds:NAME', or a set made here: 'arithmetic',
    'python:packages', 'python:instructions', 'python:preferences', 'python:prefix'."""
    columns: tuple[str, ...] = ()
    """The names of the columns of CSV and TSV files whose first line does not tell them."""
    val_paths: tuple[str, ...] = ()
    """What to validate on; empty: a part of `paths`, held out."""
    test_paths: tuple[str, ...] = ()
    """What to test on at the end; empty: a part of `paths`, held out."""
    val_fraction: float = 0.1
    """The part held out where there are no `val_paths`, by a hash of the content: equal records
    are never on both sides."""
    test_fraction: float = 0.0
    """The part held out where there are no `test_paths`."""
    balance: str = ""
    """A field, such as the label: equally many records of each of its values are kept."""
    truncate: bool = False
    """Cut what is longer than a row at its end, and say how many; else it is an error."""
    pack: bool = True
    """Several examples in a row, without seeing each other, where the objective can."""
    shuffle: bool = True
    """Rows in random order, a new one every epoch."""

    def check(self) -> None:
        """Raises InputError where a field cannot be."""
        if not self.paths:
            raise InputError("data.paths is empty; set it to files of records")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"data.{name}={getattr(self, name)}; set it from 0 to below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.val_fraction={self.val_fraction} and test_fraction={self.test_fraction} "
                "leave nothing to train on; set them to less than 1 together"
            )
        if len(set(self.columns)) < len(self.columns):
            raise InputError(f"data.columns={self.columns} has a name twice; name each once")


class Record(NamedTuple):
    """A piece of data with named fields, and where it was read, for errors."""

    where: str
    values: dict[str, Any]

    def text(self, field: str) -> str:
        """The text of a field; InputError where there is none, or nothing in it."""
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            there = ", ".join(self.values)
            raise InputError(
                f"{self.where}: {field} is {value!r}, and it has to be text; there are {there}"
            )
        return value

    @property
    def digest(self) -> str:
        """SHA-256 of the values, the same for equal ones."""
        values = json.dumps(self.values, sort_keys=True, default=str)  # parquet has dates
        return hashlib.sha256(values.encode()).hexdigest()


def open_records(
    path: str, fields: Sequence[str] = (), columns: Sequence[str] = ()
) -> list[Record]:
    """The records at `path`, in order.

    `fields` are the ends of the names of parallel files; `columns` name those of a table without a
    header. Raises InputError, with file and line, for what cannot be read as that, and for a file
    that cannot be read at all.
    """
    with reading(path):
        return _open_records(path, fields, columns)


def _open_records(path: str, fields: Sequence[str], columns: Sequence[str]) -> list[Record]:
    from jaxgpt.data.made import MADE

    if path in MADE:
        return [Record(f"{path} {n}", values) for n, values in enumerate(MADE[path]())]
    if path.startswith("tfds:"):
        return _tfds(path)
    place = os.path.expanduser(path)
    suffix = os.path.splitext(place)[1].lower()
    readers: dict[str, Callable[[str, Sequence[str]], Iterator[tuple[int, Any]]]] = {
        ".csv": _table,
        ".tsv": _table,
        ".json": _json,
        ".jsonl": _lines_of_json,
        ".ndjson": _lines_of_json,
        ".parquet": _parquet,
    }
    if os.path.exists(place) and suffix in readers:
        regular_file(place)
        records, size = [], 0
        for number, values in readers[suffix](place, columns):
            if not isinstance(values, dict):
                raise InputError(f"{path}:{number} is {type(values).__name__}, not named fields")
            records.append(Record(f"{path}:{number}", values))
            size += memory_size(values)
            if size > LARGEST_RECORDS:
                raise InputError(
                    f"{path}:{number}: the records up to here take over {LARGEST_RECORDS:,} bytes "
                    "of memory, and all of a file are in memory at once; split the file, and train "
                    "on one part after another"
                )
    elif fields and all(os.path.isfile(f"{place}.{field}") for field in fields):
        records = _parallel(path, place, fields)
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(place)  # raises the reason if it is another, such as a missing permission
        parallel = " and ".join(f"{path}.{field}" for field in fields) or "parallel files"
        raise InputError(
            f"{path} is no file of records ({', '.join(readers)}), nor are there {parallel}; the "
            f"sets made here are {', '.join(MADE)}"
        )
    if not records:
        raise InputError(f"{path} holds no records; leave it out of the paths")
    for record in records:
        for text in strings([record]):
            as_text(text, record.where)  # JSON can hold half a character
    return records


def read_splits(cfg: RecordsConfig, fields: Sequence[str] = ()) -> dict[str, list[Record]]:
    """The records of `train`, `val` and `test`, each in the order of its files.

    What is held out of `paths` is decided by content alone: the records with the smallest hashes
    are the test set, the next the validation set. Raises InputError where a set that was asked for
    is empty.
    """
    cfg.check()

    def read(paths: Iterable[str]) -> list[Record]:
        return [each for path in paths for each in open_records(path, fields, cfg.columns)]

    records = read(cfg.paths)
    if cfg.balance:
        records = balanced(records, cfg.balance)
    splits = {"train": [], "val": read(cfg.val_paths), "test": read(cfg.test_paths)}
    wanted = {
        "test": 0.0 if cfg.test_paths else cfg.test_fraction,
        "val": 0.0 if cfg.val_paths else cfg.val_fraction,
    }
    if any(wanted.values()):
        digests = [record.digest for record in records]
        order = sorted(range(len(records)), key=lambda n: digests[n])
        start = end = 0
        for name, fraction in wanted.items():
            end = min(end + round(fraction * len(records)), len(records))
            # Equal records stay together.
            while start < end < len(records) and digests[order[end]] == digests[order[end - 1]]:
                end += 1
            if fraction and start == end:
                raise InputError(
                    f"data.{name}_fraction={fraction} holds out nothing of {len(records)} records; "
                    f"raise it, or set data.{name}_paths"
                )
            if fraction:
                splits[name] = [records[n] for n in sorted(order[start:end])]
            start = end
        splits["train"] = [records[n] for n in sorted(order[start:])]
    else:
        splits["train"] = records
    if not splits["train"]:
        raise InputError("nothing is left to train on; lower data.val_fraction and test_fraction")
    seen = {record.digest for record in splits["train"]}
    for name in ("val", "test"):
        if same := sum(record.digest in seen for record in splits[name]):
            say(f"{same} of {len(splits[name])} records of {name} are in the training set too")
    return splits


def balanced(records: Sequence[Record], field: str) -> list[Record]:
    """Equally many records of each value of a field, chosen by a hash of their content."""
    groups = defaultdict(list)
    for number, record in enumerate(records):
        if field not in record.values:
            there = ", ".join(record.values)
            raise InputError(f"{record.where} has no {field!r}; set data.balance to one of {there}")
        groups[str(record.values[field])].append(number)
    least = min(map(len, groups.values()))
    kept = [
        number
        for group in groups.values()
        # By the other half of the hash: the first decides what is held out.
        for number in sorted(group, key=lambda n: records[n].digest[32:])[:least]
    ]
    counts = ", ".join(f"{len(group)} of {value}" for value, group in groups.items())
    say(f"balanced by {field}: {least} of each of {len(groups)} values are kept, of {counts}")
    return [records[number] for number in sorted(kept)]


def strings(records: Iterable[Record]) -> Iterator[str]:
    """Every text in the values of records, to make a tokenizer of."""

    def within(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from within(part)

    return (text for record in records for text in within(record.values))


def memory_size(value: Any) -> int:
    """About the bytes of memory that a value takes."""
    if isinstance(value, dict):
        return VALUE_BYTES + sum(map(memory_size, value)) + sum(map(memory_size, value.values()))
    if isinstance(value, list | tuple):
        return VALUE_BYTES + sum(map(memory_size, value))
    return VALUE_BYTES + (len(value) if isinstance(value, str | bytes) else 0)


def _read_text(file: str, largest: int = LARGEST_RECORDS) -> str:
    with reading(file), open(regular_file(file), "rb") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > largest:
            raise InputError(
                f"{file} has {size:,} bytes, and such a file is read as a whole, up to "
                f"{largest:,} bytes; split it, or write it as JSON lines (.jsonl)"
            )
        data = stream.read()
    try:
        return data.decode().removeprefix("\ufeff")  # Excel's, which would begin the first name
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{file}:{line} is not UTF-8 at byte {error.start}; convert it (iconv -t UTF-8)"
        ) from None


def lines_of(text: str) -> list[str]:
    """The lines of a text; other than `splitlines`, at line feeds alone."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _table(file: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    text = _read_text(file)
    if file.lower().endswith(".tsv"):
        # Raw: a quotation mark in it is a quotation mark.
        rows = ((n, line.split("\t")) for n, line in enumerate(lines_of(text), 1) if line)
    else:
        csv.field_size_limit(sys.maxsize)  # a document may have more than 131,072 characters
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = ((reader.line_num, row) for row in reader if row)
    names = list(columns)
    try:
        for number, row in rows:
            if not names:
                names = row
                if max(Counter(names).values()) > 1 or not all(names):
                    raise InputError(
                        f"{file}:{number} does not name columns: {', '.join(names)[:200]}; "
                        "set data.columns"
                    )
                continue
            if len(row) != len(names):
                raise InputError(
                    f"{file}:{number} has {len(row)} columns, and there are {len(names)}: "
                    f"{', '.join(names)[:200]}; correct it, or set data.columns"
                )
            yield number, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num} is not CSV: {error}") from None


def _json(file: str, _: Sequence[str]) -> Iterator[tuple[int, Any]]:
    try:
        values = strict_json.loads(_read_text(file, LARGEST_JSON))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, list):
        raise InputError(f"{file} is {type(values).__name__}, not a list of objects")
    yield from enumerate(values)


def _lines_of_json(file: str, _: Sequence[str]) -> Iterator[tuple[int, Any]]:
    yield from json_lines(file)


def _parquet(file: str, _: Sequence[str]) -> Iterator[tuple[int, Any]]:
    yield from enumerate(parquet_rows(file))


def _parallel(path: str, place: str, fields: Sequence[str]) -> list[Record]:
    sides = [lines_of(_read_text(f"{place}.{field}")) for field in fields]
    if len({len(lines) for lines in sides}) > 1:
        counts = ", ".join(
            f"{path}.{field} has {len(lines)}" for field, lines in zip(fields, sides, strict=True)
        )
        raise InputError(f"lines do not pair up: {counts}; line n of one belongs to line n of all")
    return [
        Record(f"{path}:{number}", dict(zip(fields, lines, strict=True)))
        for number, lines in enumerate(zip(*sides, strict=True), 1)
    ]


def _tfds(path: str) -> list[Record]:
    from jaxgpt.data.sources import open_tfds

    found, builder, _ = open_tfds(path)
    features = builder.info.features

    def plain(where: str, value: Any, feature: Any = None) -> Any:
        if hasattr(feature, "int2str"):
            return feature.int2str(int(value)) if value >= 0 else int(value)  # -1: not told
        if isinstance(value, dict):
            return {name: plain(where, part) for name, part in value.items()}
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list):
            return [plain(where, part) for part in value]
        return as_text(value, where) if isinstance(value, bytes) else value

    records = []
    for number, given in enumerate(found):
        where = f"{path} {number}"
        values = {name: plain(where, value, features[name]) for name, value in given.items()}
        records.append(Record(where, values))
    return records


def say(line: str) -> None:
    """A line about the data, on the error stream."""
    print(f"data: {line}", file=sys.stderr)
