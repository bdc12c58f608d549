import json

import pytest

from jaxgpt import config
from jaxgpt.config import Config, TrainConfig
from jaxgpt.errors import InputError
from jaxgpt.evaluation.history import read_history
from jaxgpt.training.lock import RunLock

DEVICES = {"session": {"devices": 4, "device_kind": "TPU v5 lite"}}


def write_run(folder, records, abandoned=(), steps=10):
    """The folder of a run with a config and these records, (time, values) each."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save(Config(name="a", train=TrainConfig(steps=steps)), folder / "config.json")
    for name, some in {"metrics": records, "metrics.abandoned": abandoned}.items():
        lines = [json.dumps({"time": time, **values}) for time, values in some]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_time_of_a_killed_process_counts_too(tmp_path):
    first = [(1000.0, {"step": 0, **DEVICES}), (1050.0, {"step": 5, "loss": 3.0})]
    lost = [(1100.0, {"step": 8, "loss": 2.0})]  # trained again by the second process
    second = [
        (5000.0, {"step": 5, "session": {"devices": 8}}),
        (5060.0, {"step": 10, "loss": 1.0}),
        (5070.0, {"step": 10, "goodput": {"init": 20.0, "step": 60.0}}),
        (5090.0, {"step": 10, "finished": 10}),
    ]
    run = read_history(write_run(tmp_path / "a", first + second, lost))
    assert [session.seconds for session in run.sessions] == [100, 80]
    assert run.seconds == 180 and run.goodput == {"init": 20, "step": 60}
    assert run.device_hours == pytest.approx((4 * 100 + 8 * 80) / 3600)
    assert run.curve("loss") == ([5, 10], [3, 1])
    assert run.state == "finished" and run.step == run.steps == 10


def test_a_run_of_an_earlier_version_has_the_times_that_it_recorded(tmp_path):
    records = [
        (1000.0, {"step": 1, "loss": 3.0}),
        (1010.0, {"step": 4, "goodput": {"step": 12.0}}),
        (2000.0, {"step": 5, "loss": 2.0}),
        (2010.0, {"step": 8, "goodput": {"step": 15.0}}),
        (2011.0, {"step": 8, "finished": 8}),
    ]
    run = read_history(write_run(tmp_path / "a", records, steps=8))
    assert [session.seconds for session in run.sessions] == [12, 15]
    assert run.goodput == {"step": 27} and run.device_hours is None


def test_values_that_are_no_numbers_are_left_out_of_curves(tmp_path):
    values = [None, "3", True, [1], 2.0, 1e999]
    records = [(float(n), {"step": n, "loss": value}) for n, value in enumerate(values)]
    run = read_history(write_run(tmp_path / "a", [*records, (9.0, {"loss": 7.0})]))
    assert run.curve("loss") == ([4], [2])


@pytest.mark.parametrize(
    "damage, note",
    [
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": "[1]"}, "config.json is not a JSON object"),
        ({"config.json": '{"new_option": 1}'}, "config.json is of another version: new_option"),
        ({"metrics.jsonl": '{"step": 1}\nxx\n{"step": 2}\n'}, "metrics.jsonl: line 2 is not a rec"),
        ({"evaluation.json": '[{"a": 1}]'}, "evaluation.json: 1 entries are not results"),
        ({"evaluation.json": "nan nan"}, "evaluation.json cannot be read"),
        ({"samples.jsonl": "7\n\n"}, "samples.jsonl: line 1 is not a record"),
        ({"checkpoints/3/SHA256SUMS": "zz\n"}, "no checkpoint can be read"),
        ({"checkpoints/3/a": ""}, "no checkpoint can be read"),
    ],
)
def test_what_is_damaged_is_noted(tmp_path, damage, note, caplog):
    folder = write_run(tmp_path / "a", [(1.0, {"step": 1, "loss": 2.0})])
    for name, content in damage.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    assert any(line.startswith(note) for line in read_history(folder).notes)


def test_a_run_whose_lock_is_held_is_training(tmp_path):
    folder = write_run(tmp_path / "a", [(1.0, {"step": 1, "loss": 2.0})])
    assert read_history(folder).state == "stopped"
    with RunLock(folder):
        assert read_history(folder).state == "training"


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="is not a run's folder: it has none of config.json"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    run = read_history(tmp_path)
    assert not run.records and "there is no config.json" in run.notes
    assert (run.step, run.steps, run.state, run.seconds) == (0, None, "stopped", 0)
