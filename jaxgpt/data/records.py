"""Reads records, which are examples with named fields, and splits them into train, val and test.

A path of records is one of
- a folder or a glob of files of the following kinds;
- a table (`.csv`, `.tsv`, `.parquet`) or JSON objects (`.json`, `.jsonl`);
- a TFDS dataset (`tfds:NAME`, as for text);
- such files in a data set on the hub or at a URL (see `jaxgpt.data.remote`);
- parallel text: `data/train` for the files `data/train.en` and `data/train.de`, where line n of
  one file belongs to line n of the other;
- a synthetic dataset (see `jaxgpt.data.synthetic`).
"""

import glob
import hashlib
import json
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple

from jaxgpt.bounds import Ge, Gt, Lt, check_bounds
from jaxgpt.chat.conversations import TURNS, conversation_format, has_turns
from jaxgpt.data.columns import (
    column_of,
    fields_for,
    fields_option,
    match_columns,
    parse_fields,
    rename,
    unclear_columns,
)
from jaxgpt.data.formats import FORMATS, as_text, format_of, suffix_of
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
    """Training records. Each entry is a file (.csv, .tsv, .json, .jsonl, .parquet), a folder or a
    glob of such files, the common prefix of parallel text files (data/train for data/train.en and
    data/train.de), a TFDS dataset ('tfds:NAME'), a data set on the hub
    ('hf:OWNER/NAME[/CONFIG][@REVISION][#SPLIT or glob]'), a URL (https://, s3://, gs://), or a
    synthetic dataset: 'arithmetic', 'word_problems', 'python:packages', 'python:instructions',
    'python:preferences' or 'python:prefix'."""
    weights: tuple[Annotated[float, Gt(0)], ...] = ()
    """Sampling weight of each path, relative to the others: its fraction of the rows of a batch.
    Empty: in proportion to the number of examples. The validation loss uses the same weights if
    there are validation records for each path."""
    epochs: tuple[Annotated[float, Gt(0)], ...] = ()
    """Passes over each path in one epoch of training, in place of `weights`: 3 reads its examples
    three times as often as 1, and 0.5 half of them in each epoch. Empty: 1 each."""
    max_examples: tuple[Annotated[int, Ge(0)], ...] = ()
    """The most records to use of each path; 0: all. They are chosen by a hash of their content, so
    that they are the same in every run, and a larger number keeps them. Empty: all records."""
    columns: tuple[str, ...] = ()
    """Names of all columns, in order, of CSV and TSV files that have no header."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for each field whose column has another name, such as label=Category or
    "text=Review Text"; PATH:FIELD=COLUMN is for one of several paths only. Other fields are read
    from the column of the same name, ignoring case, or from the only column with a common name for
    the field, such as question for instruction."""
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
    invalid: Literal["error", "skip"] = "error"
    """Whether a record that the objective cannot use, such as one with an empty answer or one that
    is longer than a row, is an error, or is skipped. What was skipped, and why, is printed."""
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
        for name in ("weights", "epochs", "max_examples"):
            if (given := getattr(self, name)) and len(given) != len(self.paths):
                raise InputError(
                    f"data.{name} has {len(given)} numbers for {len(self.paths)} paths; set one "
                    "number per path, or none",
                    field=f"data.{name}",
                )
        if self.weights and self.epochs:
            raise InputError(
                "data.weights and data.epochs both say how often each path is read; set one of "
                "them",
                field="data.epochs",
            )
        if self.is_mixture and len(set(self.paths)) < len(self.paths):
            twice = next(path for path in self.paths if self.paths.count(path) > 1)
            raise InputError(
                f"data.paths has {twice} twice; name it once, with a higher weight or more epochs",
                field="data.paths",
            )
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

    @property
    def is_mixture(self) -> bool:
        """Whether each path has a weight, so that a row has examples of one path only."""
        return bool(self.weights or self.epochs)


@dataclass(frozen=True)
class RecordSource:
    """One path of a mixture, for `mixture`."""

    path: str
    """The path, as in `RecordsConfig.paths`."""
    weight: float | None = None
    """The sampling weight of the source. Either every source has a weight, or none has."""
    epochs: float = 1.0
    """Passes over it in one epoch of training, if there are no weights."""
    max_examples: int = 0
    """The most records to use; 0: all."""
    fields: tuple[str, ...] = ()
    """FIELD=COLUMN for each field whose column has another name."""


def mixture(*sources: RecordSource, **options: Any) -> RecordsConfig:
    """Makes the config of a mixture of sources, whose options are then one number per path.

    Args:
        sources: The sources.
        options: Other fields of `RecordsConfig`.

    Raises:
        InputError: Some sources have a weight and others do not, or there are also epochs.

    >>> chats, faq = RecordSource("chats.jsonl", epochs=2), RecordSource("faq.csv")
    >>> mixture(chats, faq).epochs
    (2.0, 1.0)
    """
    weights = tuple(source.weight for source in sources if source.weight is not None)
    epochs = tuple(float(source.epochs) for source in sources)
    if weights and (len(weights) < len(sources) or set(epochs) != {1.0}):
        raise InputError(
            "a mixture has either the weight of every source or their epochs; set one of them",
            field="data.weights",
        )
    fields = tuple(f"{source.path}:{entry}" for source in sources for entry in source.fields)
    return RecordsConfig(
        tuple(source.path for source in sources),
        weights=tuple(map(float, weights)),
        epochs=() if weights or set(epochs) == {1.0} else epochs,
        max_examples=tuple(source.max_examples for source in sources),
        fields=(*options.pop("fields", ()), *fields),
        **options,
    )


class Record(NamedTuple):
    """One example's raw data: named fields, and where they were read from."""

    where: str
    """File and line, for error messages."""
    values: dict[str, object]
    """The value of each field."""
    source: int = 0
    """The number of the path that it was read from, among the paths of its set."""

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
    names = (*reader.fields, *reader.optional_fields)
    given = fields_for(cfg.fields, names, path, (*cfg.paths, *cfg.val_paths, *cfg.test_paths))
    place = os.path.expanduser(path)
    with reading(path):
        if path in SYNTHETIC or is_remote(path):
            files = [path]
        elif os.path.isdir(place):
            files = _files_below(path, place, note)
        elif glob.has_magic(place) and not os.path.exists(place):
            files = sorted(filter(os.path.isfile, glob.glob(place, recursive=True)))
            if not files:
                raise InputError(
                    f"no file matches {path}; check the pattern (** matches any number of folders)"
                )
        else:
            files = [path]
        return [each for file in files for each in _open_records(file, reader, cfg, given, note)]


def _files_below(path: str, place: str, note: Callable[[str], None]) -> list[str]:
    """Lists the files of records in a folder and its subfolders.

    JSON files, which often have settings, are read only if there are no others.
    """
    found = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(place)
        for name in names
        if not name.startswith(".") and format_of(name)
    ]
    files = [file for file in found if suffix_of(file) != ".json"] or found
    if not files:
        raise InputError(
            f"the folder {path} contains no file of records ({', '.join(FORMATS)}); use one that "
            "does, or a glob"
        )
    if len(files) < len(found):
        note(f"{path}: left out {len(found) - len(files)} .json files; use a glob to read them")
    return sorted(files)


def _open_records(
    path: str,
    reader: Reader,
    cfg: RecordsConfig,
    given: Mapping[str, str],
    note: Callable[[str], None],
) -> list[Record]:
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
    known = reader.conversational and all(conversation_format(r.values) for r in records)
    lists = set()
    if reader.conversational:  # the objective itself finds lists of messages
        lists = {k for r in records for k, v in r.values.items() if isinstance(v, list | dict)}
    texts = [column for column in columns if column not in lists or column in reader.fields]
    mapping, unclear = match_columns(texts, reader.fields, reader.optional_fields, given)
    if unclear and lists:
        mapping = dict(given)
        if not known and not {*TURNS, *reader.fields} & {*columns, *given}:
            found, unclear = match_columns(columns, reader.fields, reader.optional_fields, given)
            turns = [k for k in columns if all(has_turns(r.values.get(k)) for r in records)]
            if not unclear:
                mapping = found
            elif len(turns) == 1:
                mapping[TURNS[0]] = turns[0]
    elif unclear:
        rows = [record.values for record in records[:1000]]
        raise InputError(f"{path} {unclear_columns(columns, mapping, unclear, rows)}")
    if known:
        kinds = Counter(conversation_format(record.values) for record in records).most_common()
        parts = [kind if len(kinds) == 1 else f"{count:,} {kind}" for kind, count in kinds]
    else:
        parts = [f if f == column else f"{f} from {column!r}" for f, column in mapping.items()]
        parts = parts or [f"with the columns {shown}"]
    guessed = {
        field: column
        for field, column in mapping.items()
        if field != column and field not in given and not (known and field in reader.fields)
    }
    if guessed:
        parts += [f"{field} from {column!r}" for field, column in guessed.items() if known]
        parts.append(f"guessed from the column names; same as {fields_option(guessed)}")
    note(f"{path}: {len(records):,} record{'s' * (len(records) > 1)}, {', '.join(parts)}")
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

    def read_path(path: str, source: int, most: int = 0) -> list[Record]:
        records = open_records(path, reader, cfg, notes.append)
        if most and most < len(records):
            notes.append(
                f"{path}: kept {most:,} of {len(records):,} records (data.max_examples), chosen by "
                "a hash of their content"
            )
            records = _smallest(records, reader, most)
        return usable([record._replace(source=source) for record in records], path)

    def usable(records: list[Record], path: str) -> list[Record]:
        """The records of which `reader` can make an example, if others are skipped."""
        if cfg.invalid == "error":
            return records
        kept, reasons = [], []
        for record in records:
            try:
                reader.example(record)
                kept.append(record)
            except InputError as error:
                reasons.append(str(error))
        if reasons:
            notes.append(skipped_note(path, len(records), reasons))
        return kept

    limits = cfg.max_examples or (0,) * len(cfg.paths)
    records = [
        record
        for source, (path, most) in enumerate(zip(cfg.paths, limits, strict=True))
        for record in read_path(path, source, most)
    ]
    splits: dict[str, list[Record]] = {"train": []} | {
        name: [record for n, path in enumerate(paths) for record in read_path(path, n)]
        for name, paths in (("val", cfg.val_paths), ("test", cfg.test_paths))
    }
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


def skipped_note(what: str, count: int, reasons: Sequence[str]) -> str:
    """Returns the note about records that were skipped, with the reason for the first one."""
    return f"{what}: skipped {len(reasons):,} of {count:,} records, the first because {reasons[0]}"


def _smallest(records: list[Record], reader: Reader, most: int) -> list[Record]:
    """Returns the records with the smallest hashes, in their order."""

    def key(number: int) -> str:
        # Another hash than the one that decides what is held out.
        return _digest(["max_examples", reader.digest(records[number])])

    return [records[n] for n in sorted(sorted(range(len(records)), key=key)[:most])]


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
