"""From a path to its documents: everything arrives as it is, and what is not text is refused."""

import errno
import json
import os
import sysconfig
from pathlib import Path

import pytest

from jaxgpt.data import formats, textfile
from jaxgpt.data.sources import Source, content_digest, file_states, measure, open_source
from jaxgpt.errors import InputError

TEXTS = ["first\r\ndocument", "zweites Dokument: äöü 🙂", "", "the last one\n"]


def read(path, *fields):
    documents = open_source(str(path), fields).documents()
    return ["".join(document) for document in documents]


def write_jsonl(file: Path, records) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_parquet(file: Path, columns, **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    return file


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data set of TEXTS, prepared in both formats that need no TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()

    class Sayings(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["x"])}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {"text": text}

    folder = tmp_path_factory.mktemp("tfds")
    for file_format in ("array_record", "parquet"):
        place = folder / file_format
        Sayings(data_dir=str(place), file_format=file_format).download_and_prepare()
    return folder


def test_python_is_the_library_without_its_tests():
    files = open_source("python").files
    root = sysconfig.get_path("stdlib")
    inside = {os.path.relpath(file, root) for file in files}
    assert {"ast.py", os.path.join("json", "decoder.py")} <= inside
    assert not any({"test", "tests", "site-packages"} & set(name.split(os.sep)) for name in inside)
    assert files == open_source("python").files == tuple(sorted(files))


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_a_text_file_arrives_unchanged_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(textfile, "BLOCK", block)
    content = "line\r\nline\rline\n\tä€🙂 \x0c\ufeff"
    file = tmp_path / "text"
    file.write_bytes(content.encode())
    assert read(file) == [content]


def test_a_text_file_is_read_in_pieces_and_more_than_once(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "BLOCK", 10)
    (tmp_path / "a.txt").write_text("0123456789" * 5)
    (document,) = open_source(str(tmp_path / "a.txt")).documents()
    assert list(document) == list(document) == ["0123456789"] * 5


def test_a_folder_is_read_recursively_and_the_rest_is_reported(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "b" / "one.md").write_text("one")
    (tmp_path / "a.txt").write_text("two")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "three"}, {"text": "four"}])
    (tmp_path / "photo.png").write_bytes(b"\0")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "b" / ".git" / "config.txt").write_text("hidden")
    assert read(tmp_path) == ["two", "one", "three", "four"]
    reasons = dict(line.rsplit(": ", 1) for line in open_source(str(tmp_path)).skipped)
    assert {Path(file).name for file in reasons} == {"photo.png", "empty.txt", "config.txt"}
    assert reasons[str(tmp_path / "empty.txt")] == "empty"


def test_a_glob_takes_every_file_it_matches(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "1.log").write_text("one")
    (tmp_path / "2.log").write_text("two")
    (tmp_path / "3.txt").write_text("three")
    assert read(tmp_path / "**" / "*.log") == ["two", "one"]


def test_a_file_with_a_glob_in_its_name_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert read(tmp_path / "a[1].txt") == ["one"]


def test_json_lines_arrive_unchanged(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"body": text, "n": 1} for text in TEXTS])
    with file.open("a") as lines:
        lines.write("\n")
    assert read(file, "text=body") == TEXTS


def test_parquet_arrives_unchanged_over_row_groups(tmp_path):
    columns = {"n": list(range(400)), "body": TEXTS * 100}
    assert read(write_parquet(tmp_path / "a.parquet", columns, row_group_size=7), "text=body") == (
        TEXTS * 100
    )


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_a_tfds_data_set_is_read_without_tensorflow(prepared, file_format):
    assert sorted(read(f"tfds:sayings@{prepared / file_format}")) == sorted(TEXTS)
    assert read(f"tfds:sayings:1.0.0#test@{prepared / file_format}") == ["x"]


def test_a_slice_of_a_tfds_split_is_read(prepared):
    assert len(read(f"tfds:sayings#train[:50%]@{prepared / 'array_record'}")) == 2


def test_records_may_hold_str_or_utf8_bytes():
    assert formats.as_text("ä", "here") == formats.as_text("ä".encode(), "here") == "ä"


def test_the_size_is_that_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("äöü" * 50)
    assert measure(open_source(str(tmp_path / "a.txt"))) == 300


def test_the_digest_is_of_content_and_reading_not_of_names(tmp_path):
    def digest(name, content, *fields):
        (tmp_path / name).write_text(content)
        return content_digest(open_source(str(tmp_path / name), fields))

    record = '{"text": "a", "body": "b"}'
    same = digest("a.txt", record)
    assert digest("b.txt", record) == same
    assert digest("b.txt", "[]") != same
    assert digest("b.jsonl", record) != same
    assert digest("b.jsonl", record, "text=body") != digest("b.jsonl", record)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"abc\0def", "a.txt:1 has a NUL character, so the file is binary or in UTF-16"),
        ("a.txt", b"a\n" * 2_000_001 + b"\0", "a.txt:2000002 has a NUL character"),
        ("a.txt", b"a" * ((1 << 20) - 1) + b"\xc3\xc3", "not UTF-8 at byte 1048575"),
        ("a.txt", b"a\nc\xff", "a.txt:2 is not UTF-8 at byte 3"),
        ("a.txt", b"abc\xc3", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1 is not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "a.jsonl:3 has no field 'text'.*: body"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl:1, field 'text', is int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1, field 'text', is not text in UTF-8"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1 is list, not an object"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.parquet", b"PAR2", "a.parquet is not parquet"),
    ],
)
def test_what_is_not_text_is_refused_by_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        measure(open_source(str(tmp_path / name)))


def test_parquet_without_the_column_names_those_there_are(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"name": ["a"], "title": ["b"]})
    with pytest.raises(InputError, match=r"no column 'text'.*name, title"):
        open_source(str(file))


def test_parquet_without_a_string_is_refused_by_row(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a", None]})
    with pytest.raises(InputError, match=r"a.parquet row 1 is NoneType"):
        measure(open_source(str(file)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "there is no .*missing.txt"),
        ("nothing*.txt", "no file matches"),
        ("folder", "folder holds no text: of its 1 files"),
    ],
)
def test_a_path_to_nothing_is_refused(tmp_path, path, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / path))


@pytest.mark.parametrize(
    ("spec", "column", "message"),
    [
        ("tfds:nothing_like_it@{}/parquet", "text", "cannot open .* not found"),
        ("tfds:sayings#valid@{}/parquet", "text", r"Unknown split 'valid'.*train"),
        ("tfds:sayings@{}/parquet", "body", r"no column 'body'.*text"),
        ("tfds:sayings#train[:50%]@{}/parquet", "text", "reads 4 records, not 2"),
    ],
)
def test_a_tfds_data_set_that_cannot_be_read_is_refused(prepared, spec, column, message):
    with pytest.raises(InputError, match=message):
        open_source(spec.format(prepared), (f"text={column}",))


# Files that cannot be read


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("read_it", [measure, content_digest, file_states])
def test_a_file_that_vanishes_is_named(tmp_path, suffix, read_it):
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(file, {"text": ["one"]})
    else:
        write_jsonl(file, [{"text": "one"}])
    source = open_source(str(file))
    file.unlink()
    with pytest.raises(InputError, match=rf"{file} cannot be read: .*No such file"):
        read_it(source)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="has no file that gives EIO")
@pytest.mark.parametrize("read_it", [measure, content_digest])
def test_a_disk_that_fails_while_a_file_is_read_is_named(read_it):
    file = "/proc/self/mem"  # its first byte cannot be read
    source = Source(file, (file,), lambda: formats.documents(file, "text"))
    with pytest.raises(InputError, match=rf"{file} cannot be read: Input/output error; check"):
        read_it(source)


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("one")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=rf"{tmp_path}/a/b cannot be read: Permission denied"):
        open_source(str(tmp_path))


def test_a_path_that_cannot_be_followed_says_why(tmp_path):
    (tmp_path / "a.txt").symlink_to("a.txt")
    with pytest.raises(InputError, match=r"a.txt cannot be read: Too many levels of symbolic"):
        open_source(str(tmp_path / "a.txt"))
