"""Records: all formats give the same records, and the split depends on content alone."""

import ast
import csv
import hashlib
import json
import os
import random
import re
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt import objectives
from jaxgpt.data import synthetic as synthetic_module
from jaxgpt.data.records import (
    Reader,
    Record,
    RecordsConfig,
    RecordSource,
    mixture,
    open_records,
    read_splits,
    strings,
)
from jaxgpt.data.synthetic import REQUEST, SYNTHETIC
from jaxgpt.errors import InputError
from jaxgpt.objectives import DPO, GRPO, Classify, Instruct, Translate

TABLE = [
    {"label": "ham", "text": 'she said "no", twice'},
    {"label": "spam", "text": "gewinne €1,000 🙂"},
    {"label": "", "text": " x\x0cy\u2028z "},
]
# fmt: off
PACKAGES = {
    "asyncio", "concurrent", "ctypes", "email", "http", "json", "logging", "unittest", "urllib",
    "xml",
}
# fmt: on
shared_folder = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def values(path, *fields, **options) -> list[dict]:
    cfg = RecordsConfig(**options)
    return [record.values for record in open_records(str(path), Reader(fields), cfg)]


def write_csv(file: Path, table) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(table[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(table)
    return file


def write_tsv(file: Path, table) -> Path:
    lines = ["\t".join(row) for row in [list(table[0]), *(each.values() for each in table)]]
    file.write_bytes("".join(line + "\n" for line in lines).encode())
    return file


def write_json(file: Path, table) -> Path:
    file.write_text(json.dumps(table))
    return file


def write_jsonl(file: Path, table) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in table))
    return file


def write_parquet(file: Path, table) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(table), file)
    return file


WRITERS = {
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.json": write_json,
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.parquet": write_parquet,
}


def numbered(folder: Path, count: int, **fields) -> str:
    """A file of `count` different records."""
    table = [{"n": str(n), **fields} for n in range(count)]
    return str(write_jsonl(folder / f"{count}.jsonl", table))


# Formats


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_is_the_same_in_every_format(tmp_path, name):
    assert values(WRITERS[name](tmp_path / name, TABLE)) == TABLE


@shared_folder
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_any_text_comes_back_from_a_file_that_can_hold_it(tmp_path, name, rows):
    table = [{"a": a, "b": b} for a, b in rows]
    assert values(WRITERS[name](tmp_path / name, table)) == table


@pytest.mark.parametrize(("name", "line"), [("a.tsv", "{}\t{}"), ("a.csv", "{},{}")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_first_line_names_the_columns_unless_they_are_given(tmp_path, name, line, end, mark):
    lines = [line.format("label", "text"), line.format("ham", "hello.")]
    (tmp_path / name).write_bytes((mark + end.join(lines)).encode())
    assert values(tmp_path / name) == [{"label": "ham", "text": "hello."}]
    (tmp_path / name).write_bytes((mark + lines[1]).encode())
    assert values(tmp_path / name, columns=("a", "b")) == [{"a": "ham", "b": "hello."}]


def test_a_quotation_mark_in_tsv_is_one(tmp_path):
    (tmp_path / "a.tsv").write_text('ham\t"so\nspam\twin"\n')
    expected = [{"label": "ham", "text": '"so'}, {"label": "spam", "text": 'win"'}]
    assert values(tmp_path / "a.tsv", columns=("label", "text")) == expected


def test_a_field_of_csv_may_be_a_long_document_of_many_lines(tmp_path):
    table = [{"text": "a line, and\n" * 20_000}]
    assert values(write_csv(tmp_path / "a.csv", table)) == table


def test_objects_keep_their_lists_and_numbers(tmp_path):
    table = [{"messages": [{"role": "user", "content": "hi"}], "score": 0.5, "n": 3}]
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert values(WRITERS[name](tmp_path / name, table)) == table


def test_a_date_of_parquet_has_a_digest(tmp_path):
    (record,) = open_records(str(write_parquet(tmp_path / "a.parquet", [{"d": date(2024, 1, 2)}])))
    assert record.digest == hashlib.sha256(b'{"d": "2024-01-02"}').hexdigest()


def test_parallel_files_are_paired_line_by_line(tmp_path):
    (tmp_path / "train.en").write_text("one\n\nthree\u2028\n")
    (tmp_path / "train.de").write_text("eins\nzwei\ndrei")
    records = open_records(str(tmp_path / "train"), Reader(("en", "de")))
    assert [tuple(record.values.values()) for record in records] == [
        ("one", "eins"),
        ("", "zwei"),
        ("three\u2028", "drei"),
    ]
    assert records[2].where == f"{tmp_path / 'train'}:3"


def test_a_tfds_data_set_arrives_as_plain_text_with_names_for_labels(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()
    given = {"label": "spam", "text": "ä", "tags": ["b", "c"], "more": {"n": 3, "who": "ö"}}

    class Letters(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            features = {
                "label": tfds.features.ClassLabel(names=["ham", "spam"]),
                "text": text,
                "tags": tfds.features.Sequence(text),
                "more": {"n": np.int64, "who": text},
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, given
            yield 1, {**given, "label": -1}

    for file_format in ("array_record", "parquet"):
        folder = str(tmp_path / file_format)
        Letters(data_dir=folder, file_format=file_format).download_and_prepare()
        found = values(f"tfds:letters@{folder}")
        assert sorted(found, key=lambda each: str(each["label"])) == [
            {**given, "label": -1},
            given,
        ]


@pytest.mark.parametrize(
    ("name", "lines", "where"),
    [
        ("a.tsv", "text\na\n\nb\n", "{}:4"),
        ("a.csv", "text\na\n\nb\n", "{}:4"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', "{}:3"),
        ("a.json", '[{"text": "a"},\n{"text": "b"}]', "{}:1"),
    ],
)
def test_a_record_knows_where_it_was_read(tmp_path, name, lines, where):
    (tmp_path / name).write_text(lines)
    *_, last = open_records(str(tmp_path / name))
    assert last == Record(where.format(tmp_path / name), {"text": "b"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "a.tsv contains no records"),
        ("a.tsv", b"label\ttext\n", "a.tsv contains no records"),
        ("a.csv", b"", "a.csv contains no records"),
        ("a.jsonl", b"\n \n", "a.jsonl contains no records"),
        ("a.json", b"[]", "a.json contains no records"),
        ("a.tsv", b"a\tb\nx\ty\nz\n", "a.tsv:3 has 1 columns, not 2 \\(a, b\\)"),
        ("a.csv", b"a,b\nx,y\nz\n", "a.csv:3 has 1 columns, not 2 \\(a, b\\)"),
        ("a.csv", b'a\n"x', "a.csv:2 is not CSV: unexpected end"),
        ("a.csv", b'a\n"x"y\n', "a.csv:2 is not CSV"),
        ("a.csv", b"a,a\nx,y\n", "a.csv:1 has two columns named 'a'; rename one"),
        ("a.csv", b",\nx,y\n", "a.csv:1 names no column"),
        ("a.csv", b"a\0,\0b\nx,y\n", "a.csv:1 has a NUL .*set data.encoding=utf-16-le"),
        ("a.tsv", b"a\nx\n\xff\n", "a.tsv:3 is not UTF-8 at byte 4"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2 is list, not an object with named fields"),
        ("a.jsonl", b'{"a": {"b": ["\\ud800"]}}\n', "a.jsonl:1 is not text in UTF-8"),
        ("a.json", b'{"a": 1}', "a.json is dict, not a list"),
        ("a.json", b'[{"a": 1}, "b"]', "a.json:1 is str, not an object with named fields"),
        ("a.json", b"[", "a.json is not JSON"),
        ("a.parquet", b"PAR2", "a.parquet is not Parquet"),
        ("a.txt", b"text", "a.txt is unknown, because its suffix .*mv .*a.txt .*a.txt.tsv"),
        ("nothing", None, "nothing is not a file of records .*.tsv.*python:packages"),
    ],
)
def test_unreadable_records_are_refused_by_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_records(str(tmp_path / name))


def test_parallel_files_that_do_not_pair_up_are_refused(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n")
    with pytest.raises(
        InputError, match=r"a is not a file of records .*a.en and .*a.de do not exist"
    ):
        open_records(str(tmp_path / "a"), Reader(("en", "de")))
    for text, count in (("eins\n", 1), ("", 0)):
        (tmp_path / "a.de").write_text(text)
        with pytest.raises(
            InputError, match=rf"differ in their number of lines: .*a.en has 2, .*a.de has {count}"
        ):
            open_records(str(tmp_path / "a"), Reader(("en", "de")))


@pytest.mark.parametrize("value", [None, "", " \n", 3, ["a"]])
def test_a_field_without_text_is_refused_by_place(value):
    record = Record("spam.tsv:17", {"text": value, "label": "ham"})
    with pytest.raises(InputError, match=r"spam.tsv:17: text is .*has the fields text, label"):
        record.text("text")


def test_strings_finds_nested_text():
    nested = {"a": "one", "b": [{"c": ("two", 3)}, "three"], "d": None}
    records = [Record("", nested), Record("", {"a": "four"})]
    assert list(strings(records)) == ["one", "two", "three", "four"]


# Splits


@pytest.mark.parametrize(
    ("count", "val", "test", "sizes"),
    [
        (1494, 0.1, 0.2, (1046, 149, 299)),
        (10, 0.1, 0.0, (9, 1, 0)),
        (10, 0.0, 0.0, (10, 0, 0)),
        (3, 0.3, 0.3, (1, 1, 1)),
    ],
)
def test_held_out_fractions_are_exact_and_in_file_order(tmp_path, count, val, test, sizes):
    cfg = RecordsConfig((numbered(tmp_path, count),), val_fraction=val, test_fraction=test)
    splits = read_splits(cfg)
    assert list(splits) == ["train", "val", "test"]
    assert tuple(map(len, splits.values())) == sizes
    numbers = {name: [int(r.values["n"]) for r in records] for name, records in splits.items()}
    assert all(each == sorted(each) for each in numbers.values())
    assert sorted(n for each in numbers.values() for n in each) == list(range(count))


EXAMPLES = {  # the fields that each objective reads
    Classify(): lambda n: {"text": f"text {n}", "label": str(n % 2)},
    Instruct(): lambda n: {"instruction": f"ask {n}", "input": "", "output": "tell"},
    DPO(): lambda n: {"prompt": f"ask {n}", "chosen": "yes", "rejected": "no"},
    GRPO(): lambda n: {"instruction": f"{n} + 1", "output": str(n + 1)},
    Translate(source="en", target="de"): lambda n: {"en": f"one {n}", "de": f"eins {n}"},
}


def kind(objective):
    return type(objective).__name__


@pytest.mark.parametrize("objective", EXAMPLES, ids=kind)
def test_the_examples_with_the_smallest_hashes_are_held_out(tmp_path, objective):
    table = [EXAMPLES[objective](n) for n in range(20)]
    file = write_jsonl(tmp_path / "a.jsonl", [{**each, "id": n} for n, each in enumerate(table)])
    splits = read_splits(RecordsConfig((str(file),), test_fraction=0.2), objective.reader)
    texts = [json.dumps(each, sort_keys=True) for each in table]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    for name, expected in (("test", texts[:4]), ("val", texts[4:6])):
        held_out = [{k: v for k, v in r.values.items() if k != "id"} for r in splits[name]]
        assert {json.dumps(each, sort_keys=True) for each in held_out} == set(expected)


def test_the_split_of_every_objective_that_reads_records_is_tested():
    classes = [getattr(objectives, name) for name in objectives.__all__]
    reads = [c for c in classes if isinstance(c, type) and getattr(c, "reads_records", False)]
    assert set(reads) == {type(objective) for objective in EXAMPLES}


@pytest.mark.parametrize("objective", EXAMPLES, ids=kind)
def test_equal_examples_are_on_one_side_whatever_else_differs(tmp_path, objective):
    rng = random.Random(0)
    table = [{**EXAMPLES[objective](n), "id": copy, "n": n} for n in range(40) for copy in range(5)]
    rng.shuffle(table)
    file = write_jsonl(tmp_path / "a.jsonl", table)
    cfg = RecordsConfig((str(file),), val_fraction=0.2, test_fraction=0.2)
    splits = read_splits(cfg, objective.reader)
    sides = [{record.values["n"] for record in records} for records in splits.values()]
    assert sum(map(len, sides)) == 40 and all(sides)


@pytest.mark.parametrize(
    ("objective", "same"),
    [
        (Classify(), [{"text": "a", "label": 1}, {"text": "a", "label": " 1"}]),
        (
            Instruct(),
            [
                {"instruction": "a", "output": "b"},
                {"instruction": "a", "output": "b", "input": ""},
                {"instruction": "a", "output": "b", "input": None},
                {"messages": [dict(role="user", content="a"), dict(role="assistant", content="b")]},
            ],
        ),
    ],
    ids=["Classify", "Instruct"],
)
def test_an_example_is_the_same_however_it_is_spelled(tmp_path, objective, same):
    table = [*same, *(EXAMPLES[objective](n) for n in range(8))] * 2
    cfg = RecordsConfig((str(write_jsonl(tmp_path / "a.jsonl", table)),), val_fraction=0.3)
    splits = read_splits(cfg, objective.reader)
    counts = [sum(r.values in same for r in splits[name]) for name in ("train", "val")]
    assert sorted(counts) == [0, 2 * len(same)]


def test_a_record_in_the_training_set_too_is_found_by_what_is_read(tmp_path, capsys):
    train, val = ([{"text": "a", "label": n % 2, "id": i} for n in range(4)] for i in range(2))
    paths = [str(write_jsonl(tmp_path / f"{i}.jsonl", t)) for i, t in enumerate((train, val))]
    read_splits(RecordsConfig((paths[0],), val_paths=(paths[1],)), Classify().reader)
    assert "4 of 4 val records are also in the training set" in capsys.readouterr().err


def test_the_order_of_the_files_does_not_matter_to_what_is_held_out(tmp_path):
    table = [{"n": n, "m": n % 3} for n in range(50)]
    held_out = []
    for seed in range(2):
        random.Random(seed).shuffle(table)
        swapped = [{"m": each["m"], "n": each["n"]} for each in table]
        file = write_jsonl(tmp_path / f"{seed}.jsonl", swapped if seed else table)
        val = read_splits(RecordsConfig((str(file),)))["val"]
        held_out.append({record.values["n"] for record in val})
    assert held_out[0] == held_out[1]


@shared_folder
@given(st.lists(st.integers(0, 12), min_size=4, max_size=60))
def test_equal_records_are_never_on_two_sides(tmp_path, numbers):
    file = write_jsonl(tmp_path / "a.jsonl", [{"n": n} for n in numbers])
    try:
        splits = read_splits(RecordsConfig((str(file),), val_fraction=0.3, test_fraction=0.3))
    except InputError:  # there are too few distinct records
        return
    sides = [{record.values["n"] for record in records} for records in splits.values()]
    assert sum(map(len, sides)) == len(set(numbers)) and all(sides)
    assert Counter(numbers) == Counter(r.values["n"] for rs in splits.values() for r in rs)


def test_paths_of_their_own_are_held_out_whole_and_overlap_is_said(tmp_path, capsys):
    train, val, test = (numbered(tmp_path, count) for count in (8, 9, 5))
    cfg = RecordsConfig((train,), val_paths=(val,), test_paths=(test,))
    assert [len(records) for records in read_splits(cfg).values()] == [8, 9, 5]
    assert capsys.readouterr().err.endswith(
        "data: 8 of 9 val records are also in the training set\n"
        "data: 5 of 5 test records are also in the training set\n"
    )


def test_balancing_keeps_equally_many_and_says_so(tmp_path, capsys):
    table = [{"label": ("ham", "spam")[n % 5 == 0], "text": str(n)} for n in range(50)]
    file = str(write_tsv(tmp_path / "a.tsv", table))
    splits = read_splits(RecordsConfig((file,), balance="label", val_fraction=0.2))
    kept = [record.values for records in splits.values() for record in records]
    assert Counter(each["label"] for each in kept) == {"ham": 10, "spam": 10}
    assert [len(records) for records in splits.values()] == [16, 4, 0]
    assert "label: kept 10 for each of 2 values, out of 10 of spam, 40 of ham" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (4, {"paths": ()}, "data.paths is empty"),
        (
            4,
            {"val_fraction": 1.0},
            "data.val_fraction=1.0; set it from 0 to below 1",
        ),
        (4, {"test_fraction": -0.1}, "data.test_fraction=-0.1"),
        (4, {"val_fraction": 0.5, "test_fraction": 0.5}, "leave no training records"),
        (4, {"columns": ("a", "a")}, "data.columns=.* has a duplicate name"),
        (4, {"val_fraction": 0.1}, "data.val_fraction=0.1 of 4 records gives an empty val set"),
        (4, {"test_fraction": 0.1}, "data.test_fraction=0.1 of 4 records gives an empty test set"),
        (1, {"val_fraction": 0.9}, "no training records are left"),
        (4, {"balance": "label"}, "4.jsonl:1 has no field 'label'; set data.balance to one of n"),
    ],
)
def test_invalid_splits_are_refused(tmp_path, count, options, message):
    cfg = RecordsConfig(**{"paths": (numbered(tmp_path, count),), **options})
    with pytest.raises(InputError, match=message):
        read_splits(cfg)


# Several paths


def test_a_folder_and_a_glob_are_their_files_in_order(tmp_path, capsys):
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / ".hidden.jsonl").write_text("")
    for name in ("b.jsonl", "more/a.csv", "settings.json"):
        table = [{"name": name}]
        WRITERS[f"a{Path(name).suffix}"](tmp_path / "data" / name, table)
    assert [each["name"] for each in values(tmp_path / "data")] == ["b.jsonl", "more/a.csv"]
    assert "left out 1 .json file" in capsys.readouterr().err
    found = values(f"{tmp_path}/data/**/[as]*")
    assert [each["name"] for each in found] == ["more/a.csv", "settings.json"]
    (tmp_path / "data" / "b.jsonl").unlink()
    (tmp_path / "data" / "more" / "a.csv").unlink()
    assert values(tmp_path / "data") == [{"name": "settings.json"}]
    with pytest.raises(InputError, match=r"no file matches .*x\*"):
        values(f"{tmp_path}/x*")
    (tmp_path / "data" / "settings.json").unlink()
    with pytest.raises(InputError, match="contains no file of records"):
        values(tmp_path / "data")


def test_the_most_examples_of_a_path_are_chosen_by_their_content(tmp_path, capsys):
    table = [{"text": f"text {n}", "label": str(n % 2)} for n in range(60)]
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "z", "label": "2"}] * 3)

    def kept(table, most):
        file = write_jsonl(tmp_path / "a.jsonl", table)
        cfg = RecordsConfig((str(file), str(other)), max_examples=(most, 0), val_fraction=0)
        records = read_splits(cfg, Classify().reader)["train"]
        assert [record.source for record in records[-3:]] == [1, 1, 1]
        return [record.values["text"] for record in records[:-3]]

    few, many = kept(table, 10), kept(table, 25)
    assert len(few) == 10 and len(many) == 25 and set(few) < set(many)
    texts = [each["text"] for each in table]
    assert many == [text for text in texts if text in many] != texts[:25]
    assert "a.jsonl: kept 10 of 60 records (data.max_examples)" in capsys.readouterr().err
    shuffled = random.Random(0).sample(table, 60)
    assert set(kept([{**each, "id": n} for n, each in enumerate(shuffled)], 25)) == set(many)
    assert kept(table, 60) == kept(table, 0) == texts


BROKEN = [
    {"instruction": "a", "output": "b"},
    {"instruction": "c", "output": ""},
    {"messages": []},
    {"instruction": "d", "output": "e"},
]


def test_invalid_records_are_skipped_if_asked_and_it_is_said(tmp_path, capsys):
    file = str(write_jsonl(tmp_path / "a.jsonl", BROKEN))
    with pytest.raises(InputError, match=r"a.jsonl:2: output is ''"):
        read_splits(RecordsConfig((file,)), Instruct().reader)
    cfg = RecordsConfig((file,), val_fraction=0, invalid="skip")
    records = read_splits(cfg, Instruct().reader)["train"]
    assert [record.values["instruction"] for record in records] == ["a", "d"]
    said = capsys.readouterr().err
    assert "a.jsonl: skipped 2 of 4 records, the first because " in said and ":2: output" in said


def chat(*contents, names=("role", "content"), roles=("user", "assistant")):
    role, content = names
    return [{role: roles[n % 2], content: each} for n, each in enumerate(contents)]


def sharegpt(*contents):
    return chat(*contents, names=("from", "value"), roles=("human", "gpt"))


@pytest.mark.parametrize(
    ("name", "table", "said"),
    [
        ("a.jsonl", [{"messages": chat("a", "b"), "id": 1}], "1 record, OpenAI messages"),
        ("a.json", [{"conversations": sharegpt("a", "b")}], "1 record, ShareGPT conversations"),
        (
            "a.json",
            [{"conversations": sharegpt("a", "b", "c")}, {"conversations": sharegpt("a", "b")}],
            "2 records, 1 ShareGPT conversations, cut after the last answer, 1 ShareGPT conv",
        ),
        ("a.json", [{"instruction": "a", "input": "", "output": "b"}] * 2, "2 records, Alpaca"),
        ("a.jsonl", [{"prompt": "a", "completion": "b"}], "1 record, prompt and completion"),
        ("a.jsonl", [{"dialog": chat("a", "b")}], "messages from 'dialog', guessed .* messages=d"),
        ("a.csv", [{"Question": "a", "Reply": "b"}], "instruction from 'Question', output from"),
        (
            "a.jsonl",
            [{"instruction": "a", "context": "b", "response": "c"}],
            "instruction and response, input from 'context', guessed",
        ),
    ],
)
def test_the_format_of_conversations_is_said(tmp_path, capsys, name, table, said):
    file = str(WRITERS[name](tmp_path / name, table))
    records = open_records(file, Instruct().reader)
    assert re.search(f"^data: {file}: .*{said}", capsys.readouterr().err)
    for record in records:
        assert [m.content for m in Instruct().example(record).messages][-1] in "bc"


def test_a_mixture_has_an_option_per_path():
    sources = [
        RecordSource("a.jsonl", epochs=2, max_examples=100),
        RecordSource("b.csv", fields=("instruction=Q",)),
    ]
    assert mixture(*sources, val_fraction=0.2, fields=("output=A",)) == RecordsConfig(
        ("a.jsonl", "b.csv"),
        epochs=(2.0, 1.0),
        max_examples=(100, 0),
        fields=("output=A", "b.csv:instruction=Q"),
        val_fraction=0.2,
    )
    weighted = [RecordSource("a", weight=1), RecordSource("b", weight=0.5)]
    assert mixture(*weighted).weights == (1.0, 0.5) and not mixture(*weighted).epochs
    for wrong in (RecordSource("b"), RecordSource("b", weight=1, epochs=2)):
        with pytest.raises(InputError, match="either the weight of every source or their epochs"):
            mixture(weighted[0], wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0,)}, "data.weights has 1 numbers for 2 paths; set one number per path"),
        ({"max_examples": (1, 2, 3)}, "data.max_examples has 3 numbers for 2 paths"),
        ({"epochs": (1.0, 0.0)}, "data.epochs=.*; set each above 0"),
        ({"weights": (1.0, 1.0), "epochs": (1.0, 1.0)}, "both say how often each path is read"),
        ({"paths": ("a", "a"), "epochs": (1.0, 2.0)}, "data.paths has a twice; name it once"),
        ({"max_examples": (-1, 0)}, "set each to 0 or more"),
    ],
)
def test_an_invalid_mixture_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        RecordsConfig(**{"paths": ("a", "b"), **options}).check()


# Synthetic datasets


@pytest.fixture(scope="module")
def synthetic():
    """The synthetic datasets, made from a few packages of the library for speed."""
    root, files = synthetic_module.standard_library()
    few = [file for file in files if Path(file).relative_to(root).parts[0] in PACKAGES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_module, "standard_library", lambda: (root, few))
        synthetic_module._docstrings.cache_clear()
        yield {name: open_records(name) for name in SYNTHETIC}
        synthetic_module._docstrings.cache_clear()


def test_synthetic_records_know_where_they_are_from(synthetic):
    for name, records in synthetic.items():
        assert [record.where for record in records[:2]] == [f"{name} 0", f"{name} 1"]


def test_the_label_of_a_docstring_is_its_package_one_of_the_eight_with_the_most(synthetic):
    import email.message

    labels = Counter(record.values["label"] for record in synthetic["python:packages"])
    assert len(labels) == 8 and set(labels) < PACKAGES and min(labels.values()) > 10
    text = email.message.Message.attach.__doc__.split("\n\n")[0]
    wanted = {"text": " ".join(text.split()), "label": "email"}
    assert wanted in [record.values for record in synthetic["python:packages"]]


def test_instructions_ask_for_the_docstring_of_a_real_function(synthetic):
    import json.decoder

    wanted = {
        "instruction": REQUEST,
        "input": "def raw_decode(self, s, idx=0):",
        "output": " ".join(json.decoder.JSONDecoder.raw_decode.__doc__.split("\n\n")[0].split()),
    }
    assert wanted in [record.values for record in synthetic["python:instructions"]]


def test_preferences_are_between_two_docstrings(synthetic):
    answers = {each.values["output"] for each in synthetic["python:instructions"]}
    for record in synthetic["python:preferences"]:
        chosen, rejected = record.text("chosen"), record.text("rejected")
        assert chosen != rejected and {chosen, rejected} <= answers
        assert record.text("prompt").startswith(f"{REQUEST}\n\ndef ")


def test_prefix_forms_are_of_thousands_of_different_short_expressions(synthetic):
    pairs = {r.values["python"]: r.values["prefix"] for r in synthetic["python:prefix"]}
    assert len(pairs) == len(synthetic["python:prefix"]) > 3000
    assert max(map(len, pairs)) <= 60 and all(form[0] == "(" for form in pairs.values())


@pytest.mark.parametrize(
    ("python", "form"),
    [
        ("a + b * f(c)", "(+ a (* b (f c)))"),
        ("-x ** 2", "(neg (** x 2))"),
        ("not a.b or c[0] is not None", "(or (not (. a b)) (is-not (at c 0) None))"),
        ("(a, [b]) if 0 < c else ()", "(if (< 0 c) (tuple a (list b)) (tuple))"),
        ("f()", "(f)"),
    ],
)
def test_a_prefix_form_names_the_operator_first(python, form):
    assert synthetic_module._prefix(ast.parse(python, mode="eval").body) == form


def test_arithmetic_is_complete_and_correct(synthetic):
    problems = {r.values["instruction"]: r.values["output"] for r in synthetic["arithmetic"]}
    assert len(problems) == 2 * 90 * 90
    assert all(eval(asked.removesuffix("=")) == int(answer) for asked, answer in problems.items())


def test_synthetic_datasets_are_deterministic(synthetic):
    for name in ("python:preferences", "arithmetic"):
        assert open_records(name) == synthetic[name]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="has no file that gives EIO")
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.en"])
def test_a_disk_that_fails_while_records_are_read_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # its first byte cannot be read
    message = rf"{tmp_path / name} cannot be read: Input/output error; check"
    with pytest.raises(InputError, match=message):
        open_records(str(tmp_path / name).removesuffix(".en"), Reader(("en",)))


def test_a_path_of_records_that_cannot_be_followed_says_why(tmp_path):
    (tmp_path / "a.csv").symlink_to("a.csv")
    with pytest.raises(InputError, match=r"a.csv cannot be read: Too many levels of symbolic"):
        open_records(str(tmp_path / "a.csv"))
