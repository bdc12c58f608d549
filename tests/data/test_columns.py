"""The columns of fields: set by an option, guessed by name, or an error with the option to use."""

import csv
import json
import shlex

import pytest

from jaxgpt.data.columns import fields_for, match_columns, parse_fields, rename
from jaxgpt.data.records import RecordsConfig, open_records, read_splits
from jaxgpt.errors import InputError
from jaxgpt.objectives import DPO, GRPO, Classify, Instruct, Translate

ROWS = [(f"text {n}, of {n % 3} words.", ("ham", "spam")[n % 2]) for n in range(8)]
OBJECTIVES = {
    "classify": Classify(),
    "instruct": Instruct(),
    "dpo": DPO(),
    "grpo": GRPO(),
    "translate": Translate(source="en", target="de"),
}


def write(file, rows, header=(), separator=","):
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter=separator).writerows([header, *rows] if header else rows)
    return str(file)


def read(path, objective, **options):
    return [r.values for r in open_records(path, objective.reader, RecordsConfig(**options))]


def obey(path, objective, error):
    """Reads the records with the option that an error suggests."""
    typed = shlex.split(str(error).split("--data.", 1)[1].partition(" (if")[0])
    values = [word for word in typed[1:] if not word.startswith("--")]
    return read(path, objective, **{typed[0]: tuple(values)})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_columns_are_named_by_one_option_for_every_objective(tmp_path, objective):
    reads = OBJECTIVES[objective]
    names = [f"Column {n}" for n in range(len(reads.fields))]
    option = tuple(f"{field}={name}" for field, name in zip(reads.fields, names, strict=True))
    rows = [[f"{name} {row}." for name in names] for row in range(3)]
    path = write(tmp_path / "a.csv", rows, names)
    expected = [dict(zip(reads.fields, row, strict=True)) for row in rows]
    assert read(path, reads, fields=option) == expected


@pytest.mark.parametrize(
    ("objective", "header", "guess"),
    [
        ("classify", "Category,Message", "label=Category text=Message"),
        ("classify", "review,sentiment", "text=review label=sentiment"),
        ("classify", "id,keyword,text,target", "label=target"),
        ("classify", "idx,sentence,label", "text=sentence"),
        ("classify", "Text,LABEL", "text=Text label=LABEL"),
        ("instruct", "question,answer", "instruction=question output=answer"),
        ("instruct", "instruction,context,response", "input=context output=response"),
        ("instruct", "Prompt,Completion", "instruction=Prompt output=Completion"),
        ("dpo", "question,chosen,rejected", "prompt=question"),
        ("grpo", "problem,solution", "instruction=problem output=solution"),
    ],
)
def test_common_names_are_guessed(objective, header, guess):
    reads = OBJECTIVES[objective]
    found, unclear = match_columns(header.split(","), reads.fields, reads.optional_fields)
    assert not unclear
    assert {f: c for f, c in found.items() if f != c} == parse_fields(guess.split(), ())


def test_a_guess_is_said(tmp_path, capsys):
    path = write(tmp_path / "a.csv", ROWS, ("Message", "Category"))
    read_splits(RecordsConfig((path,), val_fraction=0.5), Classify().reader)
    assert capsys.readouterr().err == (
        f"data: {path}: 8 records, label from 'Category', text from 'Message', guessed from the "
        "column names; same as --data.fields label=Category text=Message\n"
    )


def test_a_field_may_be_set_for_one_of_several_paths():
    option, paths = ["text=body", "b.csv:text=mail", "tfds:x:label=kind"], ["a.csv", "b.csv"]
    assert fields_for(option, (), "a.csv", [*paths, "tfds:x"]) == {"text": "body"}
    assert fields_for(option, (), "b.csv", [*paths, "tfds:x"]) == {"text": "mail"}
    assert fields_for(option, (), "tfds:x", [*paths, "tfds:x"]) == {"text": "body", "label": "kind"}
    with pytest.raises(InputError, match="data.fields sets 'c.csv:text', but the objective reads"):
        fields_for(["c.csv:text=mail"], ["text"], "a.csv", paths)


def test_a_required_field_has_priority_over_an_optional_one():
    found, unclear = match_columns(["input", "output"], ["instruction", "output"], ["input"])
    assert (found, unclear) == ({"output": "output", "instruction": "input"}, {})


@pytest.mark.parametrize(
    ("objective", "header", "says", "option"),
    [
        (
            "instruct",
            "question,answer,response",
            "candidates for output: answer, response",
            "output=",
        ),
        ("classify", "Title,Body,Comment,label", "candidates for text: Body, Comment", "text="),
        ("classify", "v1,v2", "which one is label and which one is text", "label="),
        ("translate", "English words,German words", "which one is en and which one is de", "en="),
    ],
)
def test_an_ambiguous_field_shows_the_columns_and_the_option(
    tmp_path, objective, header, says, option
):
    names = header.split(",")
    rows = [[f"{name} {n % 2}" for name in names] for n in range(8)]
    path = write(tmp_path / "a.csv", rows, names)
    with pytest.raises(InputError, match=rf"columns {header.replace(',', ', ')}.*{says}") as error:
        read(path, OBJECTIVES[objective])
    assert f"--data.fields {option}" in str(error.value).replace("'", "")
    assert len(obey(path, OBJECTIVES[objective], error.value)) == 8


@pytest.mark.parametrize(
    ("objective", "values"),
    [
        ("instruct", {"id": "1", "conversations": [{"from": "human", "value": "hi"}]}),
        ("instruct", {"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}),
        ("dpo", {"chosen": [{"role": "user"}], "rejected": [{"role": "user"}], "score": 1}),
    ],
)
def test_lists_of_messages_are_left_to_the_objective(tmp_path, objective, values):
    (tmp_path / "a.json").write_text(json.dumps([values]))
    assert read(str(tmp_path / "a.json"), OBJECTIVES[objective]) == [values]


def test_a_field_in_nested_values_is_named_by_its_path(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": 1, "translation": {"en": "yes", "de": "ja"}}\n')
    fields = ("en=translation.en", "de=translation.de")
    (values,) = read(str(file), OBJECTIVES["translate"], fields=fields)
    assert (values["en"], values["de"]) == ("yes", "ja")


def test_a_column_takes_the_name_and_the_place_of_the_field():
    values = {"text": "old", "id": 1, "body": "new"}
    assert rename(values, {"text": "body"}) == {"text": "new", "id": 1}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("text",), "use FIELD=COLUMN"),
        (("text=",), "use FIELD=COLUMN"),
        (("body=text",), "sets 'body', but the objective reads label, text"),
        (("text=a", "text=b"), "sets text twice"),
        (
            ("text=nothing",),
            "has no column 'nothing', which data.fields sets for text; its columns are",
        ),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, fields, says):
    path = write(tmp_path / "a.csv", ROWS, ("text", "label"))
    with pytest.raises(InputError, match=says):
        read(path, Classify(), fields=fields)


# Headers


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("header", [("text", "label"), ("v1", "v2"), ("Sätze", "was es ist")])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("empty", [0, 3])
@pytest.mark.parametrize("columns", ["", "text label", "label text", "n text label"])
def test_a_header_is_never_a_record(tmp_path, header, index, empty, separator, columns):
    rows = [[*[str(n)] * index, *row, *[""] * empty] for n, row in enumerate(ROWS)]
    names = [*[""] * index, *header, *[""] * empty]
    path = write(tmp_path / ("a.csv" if separator == "," else "a.tsv"), rows, names, separator)
    try:
        found = read(path, Classify(), columns=tuple(columns.split()))
    except InputError as error:
        assert "data.columns" not in str(error) or "remove data.columns" in str(error)
        found = obey(path, Classify(), error) if "--data" in str(error) else read(path, Classify())
    assert [(values["text"], values["label"]) for values in found] == ROWS


def test_a_header_over_sentences_is_no_record_for_data_columns(tmp_path):
    rows = [(f"Go {n}!", f"Va {n} !") for n in range(5)]
    path = write(tmp_path / "a.csv", rows, ("English words/sentences", "French words/sentences"))
    reads = Translate(source="en", target="fr")
    with pytest.raises(InputError, match="is a header .*remove data.columns") as error:
        read(path, reads, columns=("en", "fr"))
    assert [(v["en"], v["fr"]) for v in obey(path, reads, error.value)] == rows


def test_a_header_in_the_middle_of_a_file_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", [*ROWS, ("\ufefftext", "label"), *ROWS], ("text", "label"))
    with pytest.raises(InputError, match="a.csv:10 repeats the header; remove the line"):
        read(path, Classify())


def test_an_index_whose_name_is_left_out_is_no_column(tmp_path):  # as in R's write.table
    path = write(tmp_path / "a.csv", [(n, *row) for n, row in enumerate(ROWS)], ("text", "label"))
    assert [(values["text"], values["label"]) for values in read(path, Classify())] == ROWS


def test_a_text_with_a_comma_is_no_index(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\none, two,a\nthree, four,b\n")
    with pytest.raises(InputError, match="a.csv:2 has 3 columns, not 2 \\(text, label\\)"):
        read(str(tmp_path / "a.csv"), Classify())


def test_a_line_above_the_header_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("# exported\ntext,label\none,a\n")
    with pytest.raises(
        InputError, match="a.csv:1 has 1 column .*add columns for them, with a header"
    ):
        read(str(tmp_path / "a.csv"), Classify())


def test_excels_line_that_names_the_separator_is_no_record(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\r\ntext;label\r\none, two;a\r\n")
    assert read(str(tmp_path / "a.csv"), Classify()) == [{"text": "one, two", "label": "a"}]


def test_columns_without_a_name_are_counted(tmp_path, capsys):
    rows = [(n, *row, "", ("", "more")[n == 3]) for n, row in enumerate(ROWS)]
    path = write(tmp_path / "a.csv", rows, ("", "text", "label", "", ""))
    assert set(read(path, Classify())[0]) == {"text", "label"}
    assert "without a name (1, 4, 5 of 5), which have 9 non-empty cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "rows", "columns"),
    [
        ("classify", [(b, a) for a, b in ROWS], "label text"),
        ("classify", [(str(n), a, b) for n, (a, b) in enumerate(ROWS)], "column1 text label"),
        ("translate", [(f"This is {n}.", f"Das ist {n}.") for n in range(5)], "en de"),
    ],
)
def test_a_file_without_a_header_is_recognised(tmp_path, objective, rows, columns):
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(InputError, match=f"no header.*--data.columns {columns}$") as error:
        read(path, OBJECTIVES[objective])
    names = columns.split()
    assert obey(path, OBJECTIVES[objective], error.value) == [
        dict(zip(names, row, strict=True)) for row in rows
    ]


def test_a_first_line_that_may_be_either_is_asked_about(tmp_path):
    path = write(tmp_path / "a.csv", [("cat", "Katze"), ("dog", "Hund"), ("bird", "Vogel")])
    reads = OBJECTIVES["translate"]
    with pytest.raises(InputError, match=r"unclear .*fields en=cat de=Katze;.*columns en de"):
        read(path, reads)
    assert len(read(path, reads, columns=("en", "de"))) == 3
    assert len(read(path, reads, fields=("en=cat", "de=Katze"))) == 2


# Tables written by other programs


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_tsv_is_read_as_pandas_writes_it(tmp_path, quoting):
    texts = ["plain", 'she said "no"', "a\ttab", "two\n\nlines", '"', "3.5"]
    with (tmp_path / "a.tsv").open("w", newline="") as file:  # pandas calls csv.writer like this
        rows = [("n", "text"), *enumerate(texts)]
        csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n").writerows(rows)
    found = open_records(str(tmp_path / "a.tsv"))
    assert [record.values["text"] for record in found] == texts


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_another_separator_is_found_and_said(tmp_path, separator, capsys):
    path = write(tmp_path / "a.csv", ROWS, ("text", "label"), separator)
    assert [(v["text"], v["label"]) for v in read(path, Classify())] == ROWS
    assert f"separated by {separator!r}" in capsys.readouterr().err


def test_labels_are_stripped_and_that_is_said_once(tmp_path, capsys):
    rows = [(text, f" {label}" if n < 3 else label) for n, (text, label) in enumerate(ROWS)]
    cfg = RecordsConfig((write(tmp_path / "a.csv", rows, ("text", "label")),), val_fraction=0)
    assert Classify().fit(read_splits(cfg, Classify().reader)["train"]).labels == ("ham", "spam")
    assert "white space around 3 labels is removed, such as ' ham'" in capsys.readouterr().err


def test_the_fields_of_openai_preferences_are_found(tmp_path):
    asked = {"messages": [{"role": "user", "content": "a"}]}
    good, bad = ([{"role": "assistant", "content": text}] for text in "bc")
    file = tmp_path / "a.jsonl"
    record = {"input": asked, "preferred_output": good, "non_preferred_output": bad}
    file.write_text(json.dumps(record))
    assert read(str(file), DPO()) == [{"prompt": asked, "chosen": good, "rejected": bad}]
