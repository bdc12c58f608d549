import json
import re

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import cli
from jaxgpt.config import to_dict
from jaxgpt.errors import InputError
from jaxgpt.evaluation.history import read_history
from jaxgpt.evaluation.report import write_report
from jaxgpt.manifest import write_manifest
from jaxgpt.model.params import flat
from jaxgpt.pretrained.load import versions
from tests.evaluation.test_history import DEVICES, write_run
from tests.tiny import MODERN, PLAIN, bpe, random_params

RECORDS = [
    (1000.0, {"step": 0, **DEVICES}),
    *((1000.0 + n, {"step": n, "loss": 5 - n / 4, "grad_norm": 1.0}) for n in range(1, 11)),
    (1006.0, {"step": 5, "val_loss": 3.5, "tokens_per_second": 640.0, "mfu": 0.25}),
    (1011.0, {"step": 10, "val_loss": 2.625}),
    (1012.0, {"step": 10, "goodput": {"init": 900.0, "step": 2700.0}}),
]
RESULT = {
    **{"task": "capitals", "shots": 5, "examples": 40},
    "metrics": {"accuracy": 0.75, "loss": 1.5},
    "standard_errors": {"accuracy": 0.0693, "loss": None},
}


def write_checkpoint(folder, gpt=MODERN, **lineage):
    """A checkpoint's metadata, without arrays."""
    params = random_params(gpt.build(PLAIN))
    specs = {
        "/".join(path): f"float32[{','.join(map(str, leaf.shape))}]"
        for path, leaf in flat(params).items()
    }
    content = {
        "leaves": {"params": specs},
        "lineage": {"started_from": None, "resumed_after": [], "went_back_to": [], **lineage},
        "versions": versions(),
        "tokenizer": bpe().to_json(),
        "metrics": {"step": 10},
        "format": {"version": 2},
    }
    step = folder / "checkpoints" / "10"
    step.mkdir(parents=True)
    for name, values in content.items():
        (step / f"{name}.json").write_text(json.dumps(values))
    write_manifest(step)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.fixture
def whole(tmp_path):
    folder = write_run(tmp_path / "runs" / "a", RECORDS)
    (folder / "evaluation.json").write_text(json.dumps([RESULT]))
    (folder / "samples.jsonl").write_text('{"step": 5, "text": "ab"}\n{"step": 10, "text": "cd"}\n')
    return folder


def tables(text):
    """The rows of all tables of a report in Markdown, by their first cell."""
    rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return {row.split(" | ")[0]: row.split(" | ")[1:] for row in rows}


def written(folder, *runs, **options):
    path = write_report(runs, folder, **options)
    assert path == folder / "report.html" and path.stat().st_size < 300_000
    return (folder / "report.md").read_text(), path.read_text()


def test_a_report_has_what_the_folder_has(whole, tmp_path):
    count = write_checkpoint(
        whole, started_from={"path": "runs/base", "step": 30}, resumed_after=[5], went_back_to=[5]
    )
    text, page = written(tmp_path / "out", whole, price=1.5)
    rows = tables(text)
    assert rows["validation loss"] == ["2.6250"] and rows["MFU"] == ["25.0%"]
    assert rows["time"] == ["1 h 0 min"] and rows["cost"] == ["6.00"]  # 4 devices for an hour
    assert rows["training steps"] == ["2,700.0", "75.0%"]
    assert rows["capitals"] == ["5", "40", "loss", "1.5000"]
    assert "| accuracy | 0.7500 ± 0.0693 |" in text
    assert rows["val_loss"] == ["5", "3.5000", "10", "2.6250"]
    assert rows["started from"] == ["runs/base (step 30)"]
    assert rows["went back to step"] == rows["resumed after step"] == ["5"]
    assert rows["train.steps"] == ["10", "1000"] and rows["jax"] == [versions()["jax"]]
    sizes = [row[3] for row in rows.values() if re.fullmatch(r"[\d,]+", row[3] if row[3:] else "")]
    numbers = [int(size.replace(",", "")) for size in sizes]
    assert max(numbers) == count and sum(numbers) == 2 * count  # the parts and their total
    assert "not in this report" not in text
    for shown in ("4 x TPU v5 lite", "Loss", "Gradient norm", "ab", "cd"):
        assert shown in text and shown in page


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    folder = write_run(tmp_path / "a", [(5.0, {"step": 1, "loss": 4.0})])
    text, page = written(tmp_path / "out", folder, price=2.0)
    assert "there is no checkpoint" in text and "there is no checkpoint" in page
    assert "The cost is not known" in text and tables(text)["training loss"] == ["4.0000"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").touch()
    text, _ = written(tmp_path / "out", tmp_path / "b")
    assert "there is no config.json" in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
NAMES = st.sampled_from(
    ["step", "time", "loss", "val_loss", "goodput", "session", "finished", "mfu", "skipped", "text"]
)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=6), VALUES, NAMES)
def test_damaged_records_never_prevent_a_report(tmp_path_factory, records, value, name):
    folder = tmp_path_factory.mktemp("damaged")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for file in ("metrics.jsonl", "samples.jsonl", "metrics.abandoned.jsonl"):
        (folder / file).write_text(lines)
    (folder / "evaluation.json").write_text(json.dumps([{"task": value, "metrics": {name: value}}]))
    (folder / "config.json").write_text(json.dumps({"train": value, "model": {"T": value}}))
    write_report([folder], folder, price=1.0)


def test_an_objective_of_a_config_file_is_shown_without_its_class(whole, tmp_path):
    values = json.loads((whole / "config.json").read_text())
    values["objective"] = {"type": "Mine", "margin": 2}
    (whole / "config.json").write_text(json.dumps(values))
    rows = tables(written(tmp_path / "out", whole)[0])
    assert rows["objective"][0] == "Mine" and rows["objective.margin"][0] == "2"


def test_runs_are_compared_by_results_curves_and_differences(whole, tmp_path):
    other = write_run(tmp_path / "runs" / "b|b", RECORDS[:6], steps=20)
    text, page = written(tmp_path / "out", whole, other)
    assert re.search(r"\| a \| NextToken \| finished \| 10 \| 2.5000 \| 2.6250 \|", text)
    assert re.search(r"\| b\\\|b \| NextToken \| stopped \| 5 \| 3.7500 \|", text)
    head, _, after = text.partition("## Options that differ")
    differing = tables(after.split("\n## ")[0])
    assert differing == {
        "option": ["a", r"b\|b"],
        "---": ["---", "---"],
        "train.steps": ["10", "20"],
    }
    assert "Training loss, smoothed" in head and page.count("<svg") > 4
    assert tables(head)["task"] == ["shots", "examples", "metric", "a", r"b\|b"]


def test_runs_with_other_batches_are_compared_over_tokens(whole, tmp_path):
    other = write_run(tmp_path / "runs" / "b", RECORDS)
    assert "training tokens" not in written(tmp_path / "out", whole, other)[1]
    values = to_dict(read_history(other).config)
    values["train"]["batch"] = 64
    (other / "config.json").write_text(json.dumps(values))
    assert "training tokens" in written(tmp_path / "out", whole, other)[1]


@pytest.mark.parametrize("options, error", [({"price": -1.0}, "price=-1"), ({}, "is not a run's")])
def test_wrong_input_is_an_error(whole, tmp_path, options, error):
    with pytest.raises(InputError, match=error):
        write_report([whole if options else tmp_path], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_beside_the_runs(whole, tmp_path, capsys):
    assert cli.main(["report", str(whole), "--price", "2"]) == 0
    assert capsys.readouterr().out == f"{whole}/report.html\n"
    write_run(tmp_path / "runs" / "b", RECORDS)
    assert cli.main(["report", str(whole), str(tmp_path / "runs/b")]) == 0
    assert (tmp_path / "runs/report.html").exists()
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
