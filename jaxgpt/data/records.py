"""Reads records, which are examples with named fields, and splits them into train, val and test.

A path of records is one of
- a table (`.csv`, `.tsv`, `.parquet`) or JSON objects (`.json`, `.jsonl`);
- a TFDS dataset (`tfds:NAME`, as for text);
- such files in a data set on the hub or at a URL (see `jaxgpt.data.remote`);
- parallel text: `data/train` for the files `data/train.en` and `data/train.de`, where line n of
  one file belongs to line n of the other;
- a synthetic dataset (see `jaxgpt.data.synthetic`).
"""

import hashlib
import json
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Annotated, NamedTuple

from jaxgpt.bounds import Ge, Lt, check_bounds
from jaxgpt.data.columns import (
    column_of,
    fields_option,
    match_columns,
    parse_fields,
    rename,
    unclear_columns,
)
from jaxgpt.data.formats import FORMATS, as_text, format_of
from jaxgpt.data.notes import print_note
from jaxgpt.data.remote import fetch, is_remote
from jaxgpt.data.rows import VALUE_BYTES, ReadOptions
from jaxgpt.data.synthetic import SYNTHETIC
from jaxgpt.data.tables import lines_of
from jaxgpt.data.textfile import TextFile, check_encoding, reading
from jaxgpt.data.tfds import read_tfds
from jaxgpt.errors import InputError
from jaxgpt.paths import regular_file

LARGEST_RECORDS = 1 << 32
"""Limit on the memory for the records of one file, in bytes: all of them are in memory at once."""


@dataclass(frozen=True)
class RecordsConfig:
    """Options of record data: which examples to train on, and how to batch them."""

    paths: tuple[str, ...] = ()
    """Training records. Each entry is a file (.csv, .tsv, .json, .jsonl, .parquet), the common
    prefix of parallel text files (data/train for data/train.en and data/train.de), a TFDS dataset
    ('tfds:NAME'), a data set on the hub ('hf:OWNER/NAME[/CONFIG][@REVISION][#SPLIT or glob]'), a
    URL (https://, s3://, gs://), or a synthetic dataset: 'arithmetic', 'python:packages',
    'python:instructions', 'python:preferences' or 'python:prefix'."""
    columns: tuple[str, ...] = ()
    """Names of all columns, in order, of CSV and TSV files that have no header."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for each field whose column has another name, such as label=Category or
    "text=Review Text". Other fields are read from the column of the same name, ignoring case, or
    from the only column with a common name for the field, such as question for instruction."""
    encoding: str = "utf-8"
    """Encoding of text files without a byte order mark, such as latin-1, cp1252 or utf-16-le."""
    val_paths: tuple[str, ...] = ()
    """Validation records, in the same formats as `paths`. Empty: a part of `paths` is held out."""
    test_paths: tuple[str, ...] = ()
    """Test records, evaluated once after training. Empty: `test_fraction` of `paths`."""
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Fraction of `paths` held out for validation if `val_paths` is empty; 0: no validation.
    Records are chosen by a hash of the fields that the objective reads, so that equal examples are
    always in the same split."""
    test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Fraction of `paths` held out for testing if `test_paths` is empty; 0: no test set."""
    balance: str = ""
    """A field, such as the label, whose values are balanced by downsampling: the same number of
    records is kept for each value. Empty: all records are kept."""
    truncate: bool = False
    """Truncate examples longer than a row, and print how many there are. Otherwise such an example
    is an error."""
    pack: bool = True
    """Pack several examples into one row, masked so that they do not attend to each other, if the
    objective supports it. Otherwise each example is padded to a row of its own."""
    shuffle: bool = True
    """Shuffle the rows, in a new order every epoch. Otherwise they keep the order of the files."""

    def check(self) -> None:
        """Raises InputError if a field is invalid."""
        check_bounds(self, "data.")
        if not self.paths:
            raise InputError("data.paths is empty; set it to files of records", field="data.paths")
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.val_fraction={self.val_fraction} and test_fraction={self.test_fraction} "
                "leave no training records; set them to less than 1 in total",
                field="data.val_fraction",
            )
        if len(set(self.columns)) < len(self.columns):
            raise InputError(
                f"data.columns={self.columns} has a duplicate name; give each column its own name",
                field="data.columns",
            )
        parse_fields(self.fields, ())
        check_encoding(self.encoding)


class Record(NamedTuple):
    """One example's raw data: named fields, and where they were read from."""

    where: str
    """File and line, for error messages."""
    values: dict[str, object]
    """The value of each field."""

    def text(self, field: str) -> str:
        """Returns the text of a field; raises InputError if it is missing, empty or not text."""
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            there = ", ".join(self.values)
            raise InputError(
                f"{self.where}: {field} is {value!r}, but must be non-empty text; the record has "
                f"the fields {there}"
            )
        return value

    @property
    def digest(self) -> str:
        """SHA-256 of the values: equal records have equal digests."""
        return _digest(self.values)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: object) -> object:
    """Converts a dataclass to its fields, and other values, such as Parquet's dates, to text."""
    return vars(value) if is_dataclass(value) else str(value)


@dataclass(frozen=True)
class Reader:
    """Which fields of a record an objective reads; by default all of them."""

    fields: tuple[str, ...] = ()
    """Fields that a record must have. They are also the suffixes of parallel text files."""
    optional_fields: tuple[str, ...] = ()
    """Fields that a record may have."""
    conversational: bool = False
    """Whether a record may have a list of messages in place of the fields."""
    example: Callable[[Record], object] = lambda record: record.values
    """The part of a record that the training example is made from, as JSON values and dataclasses.
    Records for which this is equal are the same example and always go into the same split."""

    def digest(self, record: Record) -> str:
        """SHA-256 of the fields that are read, or of all fields if the record has none of them."""
        names = (*self.fields, *self.optional_fields)
        read = {name: record.values[name] for name in names if name in record.values}
        return _digest(read or record.values)


def open_records(
    path: str,
    reader: Reader = Reader(),
    cfg: RecordsConfig = RecordsConfig(),
    note: Callable[[str], None] = print_note,
) -> list[Record]:
    """Reads the records at a path, with columns renamed to the fields of `reader`.

    Args:
        path: A file or dataset; the module docstring lists the formats.
        reader: Which fields to read.
        cfg: The config, whose `columns`, `fields` and `encoding` set how to read files.
        note: Called with notes for the user, such as which column was guessed; prints by default.

    Returns:
        The records in the order of the file.

    Raises:
        InputError: The file cannot be read, or has no column for one of the required fields. The
            message names the file and the line.
    """
    with reading(path):
        return _open_records(path, reader, cfg, note)


def _open_records(
    path: str, reader: Reader, cfg: RecordsConfig, note: Callable[[str], None]
) -> list[Record]:
    names = (*reader.fields, *reader.optional_fields)
    given = parse_fields(cfg.fields, names)
    place = os.path.expanduser(path)
    known = tuple(given.values())
    options = ReadOptions(cfg.encoding, "", cfg.columns, reader.fields, known, True, note)
    if path in SYNTHETIC:
        records = [Record(f"{path} {n}", values) for n, values in enumerate(SYNTHETIC[path]())]
    elif is_remote(path):
        records = [each for file in fetch(path) for each in _from_file(str(file), options)]
    elif path.startswith("tfds:"):
        records = [Record(f"{path} {n}", values) for n, values in read_tfds(path)]
    elif os.path.exists(place) and format_of(place):
        records = _from_file(path, options)
    elif reader.fields and all(os.path.isfile(f"{place}.{name}") for name in reader.fields):
        records = _parallel(path, place, reader.fields, cfg.encoding)
    else:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.stat(place)  # raises any other error, such as a missing permission
        if os.path.isfile(place):
            *most, last = FORMATS
            TextFile(place).detect_encoding()  # raises with a remedy for a PDF or an archive
            raise InputError(
                f"the format of {path} is unknown, because its suffix is none of "
                f"{', '.join(most)} and {last}; rename it, for example: "
                f"mv {shlex.quote(path)} {shlex.quote(path)}.tsv"
            )
        parallel = " and ".join(f"{path}.{name}" for name in reader.fields) or "parallel files"
        raise InputError(
            f"{path} is not a file of records ({', '.join(FORMATS)}), and {parallel} do not exist; "
            f"the synthetic datasets are {', '.join(SYNTHETIC)}"
        )
    if not records:
        raise InputError(f"{path} contains no records; remove it from the paths")
    for record in records:
        for text in strings([record]):
            as_text(text, record.where)  # JSON can contain an unpaired surrogate
    return _name_fields(path, records, reader, given, note)


def _from_file(path: str, options: ReadOptions) -> list[Record]:
    """Reads the records of a file; raises InputError if its suffix is that of no format."""
    place = regular_file(os.path.expanduser(path))
    format = format_of(path)
    if format is None:
        raise InputError(f"{path} is not a file of records; they are {', '.join(FORMATS)}")
    records, size = [], 0
    for number, values in format.read(str(place), options):
        if not isinstance(values, dict):
            raise InputError(
                f"{path}:{number} is {type(values).__name__}, not an object with named fields"
            )
        records.append(Record(f"{path}:{number}", values))
        size += memory_size(values)
        if size > LARGEST_RECORDS:
            raise InputError(
                f"{path}:{number}: the records up to here take more than {LARGEST_RECORDS:,} "
                "bytes, and a file must fit in memory; split the file, and train on one part after "
                "another"
            )
    return records


def _name_fields(
    path: str,
    records: list[Record],
    reader: Reader,
    given: Mapping[str, str],
    note: Callable[[str], None],
) -> list[Record]:
    """Renames the columns that are fields to the names of the fields.

    Raises:
        InputError: A column of `given` does not exist, or the column of a field is ambiguous.
    """
    columns = list(dict.fromkeys(name for record in records for name in record.values))
    shown = f"{', '.join(columns):.300}"
    for field, column in given.items():
        if not any(column_of(record.values, column) is not None for record in records):
            raise InputError(
                f"{path} has no column {column!r}, which data.fields sets for {field}; its "
                f"columns are {shown}"
            )
    lists = set()
    if reader.conversational:  # the objective itself finds lists of messages
        lists = {k for r in records for k, v in r.values.items() if isinstance(v, list | dict)}
    texts = [column for column in columns if column not in lists or column in reader.fields]
    mapping, unclear = match_columns(texts, reader.fields, reader.optional_fields, given)
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
        note(f"reading {pairs}, guessed from the column names; same as {fields_option(guessed)}")
    return [record._replace(values=rename(record.values, mapping)) for record in records]


def read_splits(cfg: RecordsConfig, reader: Reader = Reader()) -> dict[str, list[Record]]:
    """Reads all records and splits them into `train`, `val` and `test`.

    The records held out of `paths` depend only on the fields that are read: the examples with the
    smallest hashes are the test set, and those with the next smallest the validation set.

    Args:
        cfg: The config.
        reader: Which fields to read.

    Returns:
        The records of each split, in the order of their files.

    Raises:
        InputError: A record cannot be read, or a split that `cfg` asks for is empty.
    """
    cfg.check()
    notes: list[str] = []

    def read_paths(paths: Iterable[str]) -> list[Record]:
        return [each for path in paths for each in open_records(path, reader, cfg, notes.append)]

    records = read_paths(cfg.paths)
    splits = {"train": [], "val": read_paths(cfg.val_paths), "test": read_paths(cfg.test_paths)}
    for line in dict.fromkeys(notes):
        print_note(line)
    if cfg.balance:
        records = balanced(records, cfg.balance)
    wanted = {
        "test": 0.0 if cfg.test_paths else cfg.test_fraction,
        "val": 0.0 if cfg.val_paths else cfg.val_fraction,
    }
    examples = [_digest(reader.example(record)) for record in records]
    if any(wanted.values()):
        # Records of the same example stay together, although their other fields may differ.
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
                    f"data.{name}_fraction={fraction} of {len(records)} records gives an empty "
                    f"{name} set; increase it, or set data.{name}_paths"
                )
            if fraction:
                splits[name] = [records[n] for n in sorted(order[start:end])]
            start = end
        kept = sorted(order[start:])
    else:
        kept = list(range(len(records)))
    splits["train"] = [records[n] for n in kept]
    if not kept:
        raise InputError("no training records are left; lower data.val_fraction and test_fraction")
    seen = {examples[n] for n in kept}
    for name in ("val", "test"):
        if same := sum(_digest(reader.example(record)) in seen for record in splits[name]):
            print_note(f"{same} of {len(splits[name])} {name} records are also in the training set")
    return splits


def balanced(records: Sequence[Record], field: str) -> list[Record]:
    """Downsamples records so that every value of a field has equally many, chosen by a hash."""
    groups = defaultdict(list)
    for number, record in enumerate(records):
        if field not in record.values:
            there = ", ".join(record.values)
            raise InputError(
                f"{record.where} has no field {field!r}; set data.balance to one of {there}"
            )
        groups[str(record.values[field]).strip()].append(number)
    least = min(map(len, groups.values()))
    kept = [
        number
        for group in groups.values()
        # Uses the second half of the hash, because the first half decides what is held out.
        for number in sorted(group, key=lambda n: records[n].digest[32:])[:least]
    ]
    counts = ", ".join(f"{len(group)} of {value}" for value, group in groups.items())
    print_note(
        f"balanced by {field}: kept {least} for each of {len(groups)} values, out of {counts}"
    )
    return [records[number] for number in sorted(kept)]


def strings(records: Iterable[Record]) -> Iterator[str]:
    """Yields every string in the values of records, for example to train a tokenizer."""

    def within(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from within(part)

    return (text for record in records for text in within(record.values))


def memory_size(value: object) -> int:
    """Estimates the memory that a value takes, in bytes."""
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
        raise InputError(
            f"parallel files differ in their number of lines: {counts}; line n of each file must "
            "belong to line n of the others"
        )
    return [
        Record(f"{path}:{number}", dict(zip(fields, lines, strict=True)))
        for number, lines in enumerate(zip(*sides, strict=True), 1)
    ]
