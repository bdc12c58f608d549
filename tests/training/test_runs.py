"""`python -m jaxgpt verify` and `runs`."""

import shutil
from pathlib import Path

import pytest

from jaxgpt import config, data
from jaxgpt.cli import main
from jaxgpt.training import checkpoint
from jaxgpt.training.lock import RunLock
from jaxgpt.training.runs import list_runs, size_of, verify
from tests.runs import flip, run, spawn, wait_for_step


def token_entry():
    cfg = config.read("runs/a/config.json")
    return data.token_entries(cfg.data, checkpoint.read_metadata("runs/a")["data"])[0]


def test_an_intact_run_is_verified_with_its_checkpoints_tokens_and_metrics(trained, capsys):
    found = verify("runs/a")
    places = [one.path for one in found]
    assert places[:2] == [Path("runs/a/checkpoints/3"), Path("runs/a/checkpoints/6")]
    assert places[2:] == [token_entry(), Path("runs/a/metrics.jsonl")]
    assert not any(one.damage for one in found)
    assert main(["verify", "runs/a"]) == 0
    assert "4 of 4 intact" in capsys.readouterr().out


def test_damage_is_named_and_the_exit_status_is_1(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    assert run("--train.steps", "7") == 0  # adds its tokens to the cache
    metrics = Path("runs/a/metrics.jsonl")
    for file, said in {
        Path("runs/a/checkpoints/3/config.json"): "config.json: changed",
        Path("runs/a/checkpoints/3/SHA256SUMS"): "DAMAGED",
        token_entry() / "train-00000.bin": "train-00000.bin: changed",
        metrics: "line 1 is not a record",
    }.items():
        whole = file.read_bytes()
        if file == metrics:
            file.write_bytes(b"{\n" + whole)
        else:
            flip(file)
        capsys.readouterr()
        assert main(["verify", "runs/a"]) == 1
        output = capsys.readouterr().out
        assert said in output and output.count("DAMAGED") == 1 and "4 of 5 intact" in output
        file.write_bytes(whole)
    assert main(["verify", "runs/a"]) == 0


def test_a_folder_that_is_not_a_run_is_rejected(trained, capsys):
    assert main(["verify", "nowhere"]) == 2
    assert "nowhere is not a run's folder" in capsys.readouterr().err
    assert main(["runs", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_the_table_of_runs_shows_progress_and_damage(trained, capsys):
    shutil.copytree("runs/a", "runs/stopped")
    shutil.rmtree("runs/stopped/checkpoints/6")
    shutil.copytree("runs/a", "runs/damaged")
    flip(Path("runs/damaged/checkpoints/6/leaves.json"))
    Path("runs/damaged/checkpoints/5.damaged").mkdir()
    Path("runs/notes").mkdir()
    (Path("runs/empty/checkpoints")).mkdir(parents=True)
    states = {state.name: state for state in list_runs("runs")}
    assert sorted(states) == ["a", "damaged", "empty", "stopped"]
    done, stopped, damaged = states["a"], states["stopped"], states["damaged"]
    assert (done.step, done.steps, done.state, done.damaged) == (6, 6, "finished", ())
    assert (stopped.step, stopped.state) == (3, "stopped")
    assert damaged.damaged == ("5.damaged", "6")
    assert states["empty"].state == "empty"
    metrics = checkpoint.read_metadata("runs/a")["metrics"]
    assert done.val_loss == pytest.approx(metrics["val_loss"])
    assert done.best == pytest.approx(min(metrics["val_loss"], done.val_loss))
    assert done.bytes == size_of(Path("runs/a"))
    assert list_runs("runs", hash_files=False)[1].damaged == ("5.damaged",)
    assert main(["runs"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and "damaged: 5.damaged, 6" in rows[2]


@pytest.mark.slow
def test_a_run_that_is_training_is_shown_with_its_process(trained):
    process = spawn("--train.steps", "100000", "--checkpoint.every", "50", name="now")
    try:
        wait_for_step("now", 60)
        (state,) = [state for state in list_runs("runs") if state.name == "now"]
        assert f"process {process.pid}" in state.state and state.loss is not None
    finally:
        process.kill()
        process.communicate()
    with RunLock(Path("runs/now")):  # the kill has released it
        pass
