"""A data format is a function that yields rows and one line of `FORMATS`, for text and records."""

import gzip
import json

import pytest

from jaxgpt.data import json_files
from jaxgpt.data.formats import FORMATS, Format, open_documents
from jaxgpt.data.records import Record, RecordsConfig, open_records
from jaxgpt.data.sources import content_digest, open_source
from jaxgpt.data.textfile import TextFile
from jaxgpt.errors import InputError

NOTES = "title=First|text=one = 1\ntitle=Second|text=two\n"


def read_kv(file, options):
    """One row in a line: KEY=VALUE|KEY=VALUE."""
    for number, line in TextFile(file, options.encoding).lines():
        if "=" not in line:
            raise InputError(f"{file}:{number} has no KEY=VALUE")
        yield number, dict(pair.split("=", 1) for pair in line.split("|"))


@pytest.fixture(autouse=True)
def kv(monkeypatch):
    monkeypatch.setitem(FORMATS, ".kv", Format("kv", read_kv))


@pytest.mark.parametrize("name", ["a.kv", "a.KV", "a.kv.gz"])
def test_a_new_format_is_read_as_text(tmp_path, name):
    content = NOTES.encode("utf-16")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = open_source(str(tmp_path / name))
    assert ["".join(document) for document in source.documents()] == ["one = 1", "two"]
    titles = open_source(str(tmp_path / name), ["text=title"])
    assert ["".join(document) for document in titles.documents()] == ["First", "Second"]
    assert content_digest(source) != content_digest(titles)


def test_a_new_format_is_read_as_records(tmp_path):
    file = tmp_path / "a.kv"
    file.write_text(NOTES)
    cfg = RecordsConfig(fields=("label=title",))
    first, second = open_records(str(file), cfg=cfg)
    assert first == Record(f"{file}:1", {"label": "First", "text": "one = 1"})
    assert second.values == {"label": "Second", "text": "two"}


def test_a_new_format_is_checked_as_the_others_are(tmp_path):
    file = tmp_path / "a.kv"
    file.write_text("name=a\n")
    with pytest.raises(InputError, match=r"a.kv has no column 'text', and it is unclear which"):
        open_source(str(file))
    file.write_text("text=a\nname=b\n")
    with pytest.raises(InputError, match=r"a.kv:2 has no field 'text'; set --data.fields"):
        list(open_source(str(file)).documents())
    with pytest.raises(InputError, match=r"suffix is none of .csv, .tsv, .* and .kv; rename it"):
        (tmp_path / "a.odd").write_text("a")
        open_records(str(tmp_path / "a.odd"))


def test_lines_of_objects_in_a_json_file_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST_JSON", 100)
    file = tmp_path / "c4-train.json"
    file.write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(100)))
    texts = ["".join(text) for text in open_documents(str(file)).documents()]
    assert texts == [f"line {n}" for n in range(100)]
