"""Records: pieces of data with named fields, read from files, and held out by their content.

A path of records is a table (`.csv`, `.tsv`, `.parquet`), objects (`.json`, `.jsonl`), a TFDS data
set (`tfds:NAME`, as for text), parallel text (`data/train`, for `data/train.en` and
`data/train.de`, line by line), or one of the sets that are made here (see `made`).
"""

import hashlib
import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.data.columns import (
    column_of,
    match,
    parse_fields,
    rename,
    spelled,
    unclear_columns,
)
from jaxgpt.data.formats import (
    VALUE_BYTES,
    as_text,
    json_lines,
    json_values,
    kind_of,
    parquet_rows,
)
from jaxgpt.data.tables import lines_of, table_rows
from jaxgpt.data.textfile import TextFile, check_encoding, reading
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

LARGEST_RECORDS = 1 << 32
"""Bytes of memory for the records of one file, which are all in memory: 4 GiB."""


def say(line: str) -> None:
    """Prints a line about the data on the error stream."""
    print(f"data: {line}", file=sys.stderr)


@dataclass(frozen=True)
class RecordsConfig:
    """Which records are trained on, and how rows are made of them."""

    paths: tuple[str, ...] = ()
    """Each a file (.csv, .tsv, .json, .jsonl, .parquet), the beginning of parallel files' names
    (data/train for data/train.en and data/train.de), 'tfds:NAME', or a set made here: 'arithmetic',
    'python:packages', 'python:instructions', 'python:preferences', 'python:prefix'."""
    columns: tuple[str, ...] = ()
    """The names of all columns, in order, of CSV and TSV files without a header."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for each field that a file calls by another name, such as label=Category
    "text=Review Text". A field that is not named here is the column of its own name, whatever its
    case, or the one column with a usual name for it, such as question for instruction."""
    encoding: str = "utf-8"
    """The encoding of text files without a byte order mark, such as latin-1, cp1252, utf-16-le."""
    val_paths: tuple[str, ...] = ()
    """What to validate on; empty: a part of `paths`, held out."""
    test_paths: tuple[str, ...] = ()
    """What to test on at the end; empty: a part of `paths`, held out."""
    val_fraction: float = 0.1
    """The part held out where there are no `val_paths`, by a hash of the fields that the objective
    reads: equal examples are never on both sides."""
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
        parse_fields(self.fields, ())
        check_encoding(self.encoding)


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
        return _digest(self.values)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: Any) -> Any:
    """A dataclass as its fields; anything else, such as the dates of parquet, as text."""
    return vars(value) if is_dataclass(value) else str(value)


@dataclass(frozen=True)
class Reader:
    """What is read of a record, as an objective says; by default all of it."""

    fields: tuple[str, ...] = ()
    """The fields that a record must have; also the endings of the names of parallel files."""
    optional_fields: tuple[str, ...] = ()
    """Fields that a record may have."""
    conversational: bool = False
    """Whether a list of messages may stand for the fields."""
    example: Callable[[Record], Any] = lambda record: record.values
    """What an example is made of, in values of JSON and dataclasses. Records of which it is equal
    are the same example, and are never on two sides of a split."""

    def digest(self, record: Record) -> str:
        """SHA-256 of the fields of a record that are read; of all if it has none of them."""
        names = (*self.fields, *self.optional_fields)
        read = {name: record.values[name] for name in names if name in record.values}
        return _digest(read or record.values)


def open_records(
    path: str,
    reader: Reader = Reader(),
    cfg: RecordsConfig = RecordsConfig(),
    say: Callable[[str], None] = say,
) -> list[Record]:
    """The records at `path`, in order, with the names of fields that `reader` has for them.

    Args:
        path: See the top.
        reader: Which fields are read.
        cfg: Its `columns`, `fields` and `encoding` tell how files are read.
        say: Gets what a user should know of how the file was read; by default it is printed.

    Raises:
        InputError: With file and line, for what cannot be read, and for a file without a column
            for each field.
    """
    with reading(path):
        return _open_records(path, reader, cfg, say)


def _open_records(
    path: str, reader: Reader, cfg: RecordsConfig, say: Callable[[str], None]
) -> list[Record]:
    from jaxgpt.data.synthetic import MADE

    names = (*reader.fields, *reader.optional_fields)
    given = parse_fields(cfg.fields, names)
    place = os.path.expanduser(path)
    if path in MADE:
        records = [Record(f"{path} {n}", values) for n, values in enumerate(MADE[path]())]
    elif path.startswith("tfds:"):
        records = _tfds(path)
    elif os.path.exists(place) and kind_of(place) != "text":
        records = _from_file(path, regular_file(place), reader, cfg, given, say)
    elif reader.fields and all(os.path.isfile(f"{place}.{name}") for name in reader.fields):
        records = _parallel(path, place, reader.fields, cfg.encoding)
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(place)  # raises the reason if it is another, such as a missing permission
        if os.path.isfile(place):
            TextFile(place).detect_encoding()  # raises what to do with a PDF or an archive
            raise InputError(
                f"{path} is read by the end of its name, which is none of .csv, .tsv, .json, "
                f".jsonl, .ndjson and .parquet: rename it, for example: mv {shlex.quote(path)} "
                f"{shlex.quote(path)}.tsv"
            )
        parallel = " and ".join(f"{path}.{name}" for name in reader.fields) or "parallel files"
        raise InputError(
            f"{path} is no file of records (.csv, .tsv, .json, .jsonl, .ndjson, .parquet), nor are "
            f"there {parallel}; the sets made here are {', '.join(MADE)}"
        )
    if not records:
        raise InputError(f"{path} holds no records; leave it out of the paths")
    for record in records:
        for text in strings([record]):
            as_text(text, record.where)  # JSON can hold half a character
    return _name_fields(path, records, reader, given, say)


def _from_file(
    path: str,
    place: Path,
    reader: Reader,
    cfg: RecordsConfig,
    given: Mapping[str, str],
    say: Callable[[str], None],
) -> list[Record]:
    text = TextFile(str(place), cfg.encoding)
    rows: Iterator[tuple[int, Any]]
    match kind_of(str(place)):
        case "table":
            text = TextFile(str(place), cfg.encoding, allow_nul=True)
            known = tuple(given.values())
            rows = table_rows(
                text, cfg.columns, reader.fields, known, largest=LARGEST_RECORDS, say=say
            )
        case "json":
            rows = json_values(text)
        case "parquet":
            rows = enumerate(parquet_rows(str(place)))
        case _:
            rows = json_lines(text)
    records, size = [], 0
    for number, values in rows:
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
    return records


def _name_fields(
    path: str,
    records: list[Record],
    reader: Reader,
    given: Mapping[str, str],
    say: Callable[[str], None],
) -> list[Record]:
    """The records with each column that is a field under the field's name.

    Raises:
        InputError: A column of `given` is not there, or it is not clear which column is a field.
    """
    columns = list(dict.fromkeys(name for record in records for name in record.values))
    shown = f"{', '.join(columns):.300}"
    for field, column in given.items():
        if not any(column_of(record.values, column) is not None for record in records):
            raise InputError(
                f"{path} has no column {column!r}, which data.fields says is {field}; there are "
                f"{shown}"
            )
    lists = set()
    if reader.conversational:  # lists of messages are found by the objective
        lists = {k for r in records for k, v in r.values.items() if isinstance(v, list | dict)}
    texts = [column for column in columns if column not in lists or column in reader.fields]
    mapping, unclear = match(texts, reader.fields, reader.optional_fields, given)
    if unclear and lists:
        mapping = dict(given)
    elif unclear:
        rows = [record.values for record in records[:1000]]
        raise InputError(f"{path} {unclear_columns(columns, mapping, unclear, rows)}")
    guessed = {
        field: column for field, column in mapping.items() if field != column and field not in given
    }
    if guessed:
        pairs = ", ".join(f"{field} from {column!r}" for field, column in guessed.items())
        say(f"reading {pairs}, by the names of the columns; {spelled(guessed)} says so")
    return [record._replace(values=rename(record.values, mapping)) for record in records]


def read_splits(cfg: RecordsConfig, reader: Reader = Reader()) -> dict[str, list[Record]]:
    """The records of `train`, `val` and `test`, each in the order of its files.

    What is held out of `paths` is decided by the fields that are read: the examples with the
    smallest hashes are the test set, the next the validation set. Raises InputError where a set
    that was asked for is empty.
    """
    cfg.check()
    told: list[str] = []

    def read(paths: Iterable[str]) -> list[Record]:
        return [each for path in paths for each in open_records(path, reader, cfg, told.append)]

    records = read(cfg.paths)
    splits = {"train": [], "val": read(cfg.val_paths), "test": read(cfg.test_paths)}
    for line in dict.fromkeys(told):
        say(line)
    if cfg.balance:
        records = balanced(records, cfg.balance)
    wanted = {
        "test": 0.0 if cfg.test_paths else cfg.test_fraction,
        "val": 0.0 if cfg.val_paths else cfg.val_fraction,
    }
    examples = [_digest(reader.example(record)) for record in records]
    if any(wanted.values()):
        # Records of one example have one place in the order, although they may differ elsewhere.
        first: dict[str, str] = {}
        for example, record in zip(examples, records, strict=True):
            digest = reader.digest(record)
            first[example] = min(digest, first.get(example, digest))
        order = sorted(range(len(records)), key=lambda n: (first[examples[n]], examples[n]))
        start = end = 0
        for name, fraction in wanted.items():
            end = min(end + round(fraction * len(records)), len(records))
            while start < end < len(records) and examples[order[end]] == examples[order[end - 1]]:
                end += 1
            if fraction and start == end:
                raise InputError(
                    f"data.{name}_fraction={fraction} holds out nothing of {len(records)} records; "
                    f"raise it, or set data.{name}_paths"
                )
            if fraction:
                splits[name] = [records[n] for n in sorted(order[start:end])]
            start = end
        kept = sorted(order[start:])
    else:
        kept = list(range(len(records)))
    splits["train"] = [records[n] for n in kept]
    if not kept:
        raise InputError("nothing is left to train on; lower data.val_fraction and test_fraction")
    seen = {examples[n] for n in kept}
    for name in ("val", "test"):
        if same := sum(_digest(reader.example(record)) in seen for record in splits[name]):
            say(f"{same} of {len(splits[name])} records of {name} are in the training set too")
    return splits


def balanced(records: Sequence[Record], field: str) -> list[Record]:
    """Equally many records of each value of a field, chosen by a hash of their content."""
    groups = defaultdict(list)
    for number, record in enumerate(records):
        if field not in record.values:
            there = ", ".join(record.values)
            raise InputError(f"{record.where} has no {field!r}; set data.balance to one of {there}")
        groups[str(record.values[field]).strip()].append(number)
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


def _parallel(path: str, place: str, fields: Sequence[str], encoding: str) -> list[Record]:
    sides = []
    for field in fields:
        file = TextFile(f"{place}.{field}", encoding, allow_nul=True)
        sides.append(lines_of(file.read(LARGEST_RECORDS, "split it")))
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
