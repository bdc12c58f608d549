"""Sources of text: documents are read unchanged, and files that are not text are refused."""

import errno
import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest

from jaxgpt.data import formats, textfile
from jaxgpt.data.records import open_records
from jaxgpt.data.sources import TextSource, content_digest, file_states, measure, open_source
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
    """A TFDS dataset of TEXTS, prepared in both formats that need no TensorFlow."""
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


ENCODED = "Zürich — „Straße“\n\tçà 🙂 once\r\n"


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-16-le"])
def test_a_byte_order_mark_decides_the_encoding_and_is_removed(
    tmp_path, monkeypatch, block, encoding
):
    monkeypatch.setattr(textfile, "BLOCK", block)
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + ENCODED).encode(encoding))
    (tmp_path / "a.jsonl").write_bytes((mark + json.dumps({"text": ENCODED})).encode(encoding))
    (tmp_path / "a.json").write_bytes((mark + json.dumps([ENCODED])).encode(encoding))
    for name in ("a.txt", "a.jsonl", "a.json"):
        assert read(tmp_path / name) == [ENCODED]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift_jis", "utf-16-le", "gb18030"])
def test_the_encoding_is_an_option(tmp_path, encoding):
    text = {"latin-1": "é", "cp1252": "“€”", "shift_jis": "日本"}.get(encoding, "€日本") + "a\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (document,) = open_source(str(tmp_path / "a.txt"), encoding=encoding).documents()
    assert "".join(document) == text


def test_the_encoding_is_part_of_the_content_digest(tmp_path):
    (tmp_path / "a.txt").write_text("é")
    latin = open_source(str(tmp_path / "a.txt"), encoding="latin-1")
    assert content_digest(latin) != content_digest(open_source(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("caf\xe9".encode("latin-1"), r"--data.encoding latin-1.*iconv -f ISO-8859-1 -t UTF-8 "),
        ("\u201cyes\u201d".encode("cp1252"), r"--data.encoding cp1252.*iconv -f CP1252 -t UTF-8 "),
        ("äöüß".encode() + b"\xff", r"looks like UTF-8, so this byte is damaged; .*iconv -c"),
    ],
)
def test_text_in_another_encoding_is_refused_with_the_remedy(tmp_path, content, remedy):
    (tmp_path / "a b.txt").write_bytes(b"one\n" + content)
    with pytest.raises(InputError, match=rf"a b.txt:2 is not UTF-8 at byte .*{remedy}") as error:
        measure(open_source(str(tmp_path / "a b.txt")))
    assert str(error.value).endswith(f"'{tmp_path}/a b.txt' > '{tmp_path}/a b.utf8.txt'")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_gzip_files_are_decompressed(tmp_path, name):
    plain = tmp_path / name
    plain.write_text({"a.txt": "é", "a.csv": "text\né\n"}.get(name, '["é"]'))
    if name == "a.jsonl":
        write_jsonl(plain, [{"text": "é"}])
    fields = ["text=text"] if name == "a.csv" else []
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read(tmp_path / f"{name}.gz", *fields) == read(plain, *fields) == ["é"]


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(b"text " * 1000)
    for content in (whole[:30], whole[:-4], whole[:20] + b"\xff" * 8 + whole[28:], whole[:3]):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"a.txt.gz is a damaged gzip file"):
            measure(open_source(str(tmp_path / "a.txt.gz")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.7\n", "is a PDF, not text; .*pdftotext"),
        ("a.docx", b"PK\x03\x04", "is a Word document, .*pandoc .*a.docx -t plain"),
        ("a.xlsx", b"PK\x03\x04", "is an Excel workbook, .*libreoffice --convert-to csv"),
        ("a.zip", b"PK\x03\x04", "is a zip archive, .*unzip"),
        ("a.txt.zst", b"(\xb5/\xfd", "is compressed with zstd"),
        ("a.txt", b"PAR1", "is parquet, not text; .*mv .*a.txt.parquet"),
        ("a.tar", b"a.txt" + b"\0" * 252 + b"ustar\x0000", "is a tar archive"),
        ("a.tar.gz", gzip.compress(b"a" + b"\0" * 256 + b"ustar", mtime=0), "is a tar archive"),
    ],
)
def test_binary_formats_are_refused_with_a_conversion_command(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read_it in (open_source, open_records):
        with pytest.raises(InputError, match=rf"{name} {message}"):
            read_it(str(tmp_path / name))


def test_json_is_an_array_of_texts_or_of_records_or_lines(tmp_path):
    for content in ('["one", "two"]', '[{"text": "one"},\n{"text": "two"}]'):
        (tmp_path / "a.json").write_text(content)
        assert read(tmp_path / "a.json") == ["one", "two"]
    write_jsonl(tmp_path / "a.json", [{"text": "one"}, {"text": "two"}])  # some tools write this
    assert read(tmp_path / "a.json") == ["one", "two"]
    (tmp_path / "a.json").write_text('{"data": [{"text": "one"}], "version": 2}')
    with pytest.raises(InputError, match=r"is dict, not a list .*keep only the list under 'data'"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_column_of_a_table_is_read_if_it_is_asked_for(tmp_path, name):
    content = "id,body\n1,one\n2,two\n".replace(",", "\t" if name == "a.tsv" else ",")
    (tmp_path / name).write_text(content)
    notes = []
    (document,) = open_source(str(tmp_path / name), note=notes.append).documents()
    assert "".join(document) == content and "is read as plain text" in notes[0]
    assert read(tmp_path / name, "text=body") == ["one", "two"]
    with pytest.raises(InputError, match="no column 'text'.* one of: id, body"):
        read(tmp_path / name, "text=text")


def test_the_column_of_the_text_is_guessed_by_its_name_and_said(tmp_path):
    notes = []
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "content": "one"}] * 2)
    source = open_source(str(file), note=notes.append)
    assert ["".join(document) for document in source.documents()] == ["one", "one"]
    assert notes == [
        f"{file}: reading text from 'content', guessed from its name; same as --data.fields "
        "text=content"
    ]
    write_jsonl(file, [{"body": "one", "content": "two"}])
    with pytest.raises(InputError, match="unclear .*body, content; .*--data.fields text=body"):
        open_source(str(file))


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
        ("a.jsonl", b"\n\n", "contains no text"),
        ("a.jsonl", b'{"text": ""}\n', "contains no text"),
        ("a.parquet", b"PAR2", "a.parquet is not Parquet"),
    ],
)
def test_files_that_are_not_text_are_refused_by_position(tmp_path, name, content, message):
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
        ("missing.txt", "missing.txt does not exist"),
        ("nothing*.txt", "no file matches"),
        ("folder", "folder contains no text: none of its 1 files"),
    ],
)
def test_a_missing_path_is_refused(tmp_path, path, message):
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
    source = TextSource(file, (file,), lambda: formats.DocumentFile(file).documents())
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
