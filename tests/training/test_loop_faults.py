"""What `train.py` does when things around it go wrong: nothing that was trained is lost."""

import errno
import json
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgpt.cli import main as command
from jaxgpt.training import checkpoint, loop, metrics, pipeline, telemetry
from jaxgpt.training.command import DEFAULT
from jaxgpt.training.setup import Run
from tests.runs import (
    assert_same_run,
    cut_back,
    flip,
    losses_of,
    run,
    spawn,
    state_of,
    wait_for_step,
)

CHECKPOINTS = Path("runs/a/checkpoints")
QUICK = ("--checkpoint.patience", "0.02")


@pytest.fixture(autouse=True)
def retry_soon(monkeypatch):
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.1)


def records_of(name="a"):
    return metrics.read_metrics(Path("runs") / name / "metrics.jsonl")


def largest(folder):
    return max(folder.rglob("*"), key=lambda file: file.stat().st_size)


def files():
    return {str(file): file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}


@pytest.mark.parametrize("steps", ["6", "9"])  # of a finished run, and of one that goes on
def test_where_every_checkpoint_is_damaged_the_command_stops_and_changes_nothing(
    trained, capsys, steps
):
    for step in ("3", "6"):
        flip(largest(CHECKPOINTS / step / "params"))
    before = files()
    assert run("--train.steps", steps) == 2
    error = capsys.readouterr().err
    assert "step 6: params/" in error and "step 3: params/" in error and "step 0" in error
    assert files() | {"runs/a/lock": b""} == before | {"runs/a/lock": b""}


def test_a_damaged_checkpoint_is_moved_aside_and_stays(trained, caplog):
    flip(largest(CHECKPOINTS / "6" / "params"))
    damaged = {file.name: file.read_bytes() for file in CHECKPOINTS.glob("6/params/d/*")}
    assert run() == 0
    assert "6.damaged" in caplog.text
    assert {file.name: file.read_bytes() for file in CHECKPOINTS.glob("6.damaged/params/d/*")} == (
        damaged
    )
    assert checkpoint.read_metadata("runs/a")["metrics"]["step"] == 6


def test_stray_files_in_checkpoints_change_nothing(trained):
    for step in ("3", "6"):
        for inner in ("", "params", "train"):
            (CHECKPOINTS / step / inner / ".DS_Store").write_text("x")
    cut_back("a", "b", 3)
    assert run(name="b") == 0 and run() == 0
    assert_same_run("a", "b", 6)


SLOW = """
import sys, time, train
from jaxgpt.training import loop
log = loop.telemetry.Telemetry.log
loop.telemetry.Telemetry.log = lambda *args: (time.sleep(0.1), log(*args))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_second_start_is_refused_and_harms_nothing(here, monkeypatch, capsys):
    more = ("--train.steps", "30")
    first = spawn(*more, name="a", program=("-c", SLOW))
    wait_for_step("a", 3)
    for options in (more, ("--model.L", "3"), ("--data.paths", "nowhere")):
        assert run(*options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is being trained by process {first.pid}" in line
    output, _ = first.communicate()
    assert first.returncode == 0, output
    assert sorted(losses_of("a")) == list(range(1, 31))
    assert run(*more, name="b") == 0
    assert_same_run("a", "b", 30)


def test_errors_outside_training_never_end_a_run(here, monkeypatch, capsys):
    def fail_with(error):
        def fail(*args, **settings):
            raise error

        return fail

    gone = OSError(errno.EIO, "the terminal is gone")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", fail_with(RuntimeError("evaluate is broken")))
        patch.setattr(telemetry, "plot", fail_with(RuntimeError("plot is broken")))
        patch.setattr(loop, "load", fail_with(RuntimeError("sample is broken")))
        patch.setattr(loop, "write_report", fail_with(RuntimeError("report is broken")))
        patch.setattr(telemetry._Lines, "show", fail_with(gone))
        assert run("--train.sample_tokens", "3", "--train.prompt", "the") == 0
    warnings = capsys.readouterr().err
    for said in ("evaluate", "plot", "sample", "report"):
        assert f"{said} is broken" in warnings
    assert "terminal is gone" in warnings
    assert checkpoint.read_metadata("runs/a")["metrics"]["step"] == 6


def test_a_step_is_saved_before_it_is_evaluated(here, monkeypatch):
    seen = []
    evaluate = Run.evaluate

    def watched(self, *args):
        self.checkpoints.wait()
        seen.append(self.checkpoints.steps())
        return evaluate(self, *args)

    monkeypatch.setattr(Run, "evaluate", watched)
    assert run() == 0
    assert seen[:2] == [[3], [3, 6]]
    assert checkpoint.read_metadata(CHECKPOINTS / "3")["metrics"]["val_loss"] > 0


def test_an_error_in_the_loop_saves_the_last_finished_step(trained, monkeypatch, capsys):
    batch = Run.batch

    def broken(self, step):
        if step == 5:
            raise RuntimeError("the data is gone")
        return batch(self, step)

    monkeypatch.setattr(Run, "batch", broken)
    with pytest.raises(RuntimeError, match="the data is gone"):
        run("--checkpoint.every", "0", name="b")
    assert "step 5 is saved" in capsys.readouterr().err
    monkeypatch.setattr(Run, "batch", batch)
    assert run(name="b") == 0
    assert_same_run("a", "b", 6)


def test_the_end_of_a_killed_run_is_made_up_for(trained, capsys):
    options = ("--train.sample_tokens", "3", "--train.prompt", "the")
    assert run(*options) == 0
    assert "has all its 6 steps" in capsys.readouterr().out
    # As a kill after the last checkpoint leaves it: no evaluation, no picture, no mark.
    lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    kept = [r for r in lines if not (r["step"] == 6 and "loss" not in r)]
    Path("runs/a/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    Path("runs/a/loss.png").unlink()
    assert run(*options) == 0
    assert (
        "to use the model:  python -m jaxgpt generate" in capsys.readouterr().out
        and Path("runs/a/loss.png").exists()
    )
    measured = [{k: v for k, v in r.items() if k.startswith("val_")} for r in records_of()]
    assert [v for v in measured if v] == [
        {k: v for k, v in r.items() if k.startswith("val_")} for r in lines if "val_loss" in r
    ]
    assert run(*options) == 0
    assert "has all its 6 steps" in capsys.readouterr().out


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(trained):
    cut_back("a", "b", 3)
    lines = [r for r in records_of("b") if r["step"] < 3 or (r["step"] == 3 and "loss" in r)]
    Path("runs/b/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert run(name="b") == 0

    def val_losses(name):
        return [(r["step"], r["val_loss"]) for r in records_of(name) if "val_loss" in r]

    assert val_losses("b") == val_losses("a")


@pytest.mark.slow
def test_training_waits_while_the_disk_is_full(here, monkeypatch, capsys):
    save = Run.save
    tries = []

    def full(self, step, *args):
        tries.append(step)
        if len(tries) in (1, 2, 3):
            raise loop.TrainingError("the checkpoint was not saved: No space left on device")
        save(self, step, *args)

    monkeypatch.setattr(Run, "save", full)
    assert run() == 0
    assert tries == [3, 3, 3, 3, 6]
    assert capsys.readouterr().err.count("No space left on device; training waits") == 3
    monkeypatch.setattr(Run, "save", save)
    assert run(name="b") == 0
    assert_same_run("a", "b", 6)


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_is_made_with_a_later_step(here, monkeypatch, capsys):
    write, failures = checkpoint.writer.write_manifest, iter([True])

    def full(folder):
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder)

    monkeypatch.setattr(checkpoint.writer, "write_manifest", full)
    assert run("--train.steps", "300", "--checkpoint.every", "299") == 0
    assert "step 299 was not saved: " in capsys.readouterr().err
    assert checkpoint.read_metadata("runs/a")["metrics"]["step"] == 300


def test_a_disk_that_stays_full_ends_the_run_with_an_error(here, monkeypatch, capsys):
    def full(self, *args):
        raise loop.TrainingError("the checkpoint of step 3 was not saved: No space left")

    monkeypatch.setattr(Run, "save", full)
    assert run(*QUICK) == 1
    error = capsys.readouterr().err
    assert "training waits and tries again" in error
    assert error.splitlines()[-1].startswith("error: the checkpoint of step 3 was not saved")


@pytest.mark.slow
def test_a_folder_that_disappears_and_comes_back_is_waited_for(here, capfd):
    process = spawn("--train.steps", "100000", "--checkpoint.every", "20", name="a")
    wait_for_step("a", 21)
    Path("runs/a").rename("away")
    time.sleep(1)
    for _ in range(100):  # a save that was under way may have made it again for a moment
        with suppress(OSError):
            Path("away").rename("runs/a")
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "has disappeared" in output
    step = checkpoint.read_metadata("runs/a")["metrics"]["step"]
    assert sorted(losses_of("a")) == list(range(1, step + 1))


@pytest.mark.slow
def test_a_folder_that_stays_away_ends_the_run_with_its_state_saved(here):
    process = spawn("--train.steps", "100000", *QUICK, name="a")
    wait_for_step("a", 4)
    Path("runs/a").rename("gone")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "has disappeared" in output, output
    step = checkpoint.read_metadata("runs/a")["metrics"]["step"]
    assert f"step {step} is saved" in output


@pytest.mark.slow
def test_parameters_that_have_exploded_are_not_saved(here, monkeypatch, capsys):
    assert run() == 0
    # One update that makes the loss finite and huge.
    update = loop.Training.save

    def explode(self, wait=False):
        if self.step == 9:
            huge = jax.tree.map(lambda x: x + 300, self.state.params)
            self.state = self.state._replace(params=huge)
        update(self, wait)

    monkeypatch.setattr(loop.Training, "save", explode)
    assert run("--train.steps", "12") == 1
    error = capsys.readouterr().err
    assert "the loss of the parameters after step 9" in error and "--resume 6" in error
    assert checkpoint.read_metadata("runs/a")["metrics"]["step"] == 6
    monkeypatch.setattr(loop.Training, "save", update)
    lower = ("--optim.learning_rate", "1e-3", "--train.steps", "12")
    assert run(*lower, "--resume", "3") == 0
    assert [p.name for p in CHECKPOINTS.iterdir() if not p.name.isdecimal()] == ["6.abandoned"]
    assert checkpoint.read_metadata("runs/a")["lineage"]["went_back_to"] == [3]
    assert [r["step"] for r in records_of() if "loss" in r] == list(range(1, 13))


def test_going_back_happens_once_however_often_the_command_is_repeated(trained, capsys):
    back = ("--resume", "3", "--train.steps", "7")
    assert run(*back) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    assert run(*back) == 0
    output = capsys.readouterr().out
    assert "now resumes from step 7" in output and "has all its 7 steps" in output
    assert run("--resume", "4") == 2
    assert "resume=4: there is no such checkpoint" in capsys.readouterr().err
    assert (CHECKPOINTS / "6.abandoned").exists()


def test_a_checkpoint_of_format_1_is_resumed(trained):
    """Without the guard's arrays, as versions before wrote them."""
    cut_back("a", "b", 3)
    state = state_of("a", 3)
    assert any("guard" in path for path in state)
    folder = Path("runs/b/checkpoints/3")
    about = checkpoint.read_metadata(folder)
    leaves = about.pop("leaves")
    items = {}
    for item, paths in leaves.items():
        kept = {path: spec for path, spec in paths.items() if not path.startswith("guard/")}
        tree = checkpoint.load_params(folder, item=item)
        for path in paths.keys() - kept.keys():
            tree["guard"].pop(path.removeprefix("guard/"))
        tree.pop("guard", None)
        items[item] = tree
    shutil.rmtree(folder)
    describe = {k: v for k, v in about.items() if k not in ("metrics", "format")}
    checkpoints = checkpoint.Checkpoints(folder.parent)
    checkpoints.save(3, items, describe)
    checkpoints.close()
    assert run(name="b") == 0
    first, second = state_of("a", 6), state_of("b", 6)
    for path, leaf in first.items():
        if "guard" not in path:
            np.testing.assert_array_equal(leaf, second[path], path)


def test_loading_names_the_step_whose_parameters_it_gives(trained, caplog):
    flip(largest(CHECKPOINTS / "6" / "ema"))
    assert run("--start", "runs/a", "--train.steps", "3", name="child") == 0
    lineage = checkpoint.read_metadata("runs/child")["lineage"]["started_from"]
    assert (lineage["step"], lineage["item"]) == (3, "ema") and "6 is damaged" in caplog.text
    started = loop.load("runs/a").params["wte"]
    np.testing.assert_array_equal(started, state_of("a", 3)["ema/['wte']"])
    assert command(["generate", "runs/a", "the", "--tokens", "1"]) == 0


@pytest.mark.slow
def test_a_run_goes_from_8_devices_to_4_to_2_to_1_and_back(here):
    """Restored bit-equal on any number of devices; the next 30 losses are the same."""
    options = ("--train.steps", "40", "--checkpoint.every", "10", "--model.dropout", "0")
    options = (*options, "--train.eval_every", "0")
    assert run(*options, "--parallel.devices", "8") == 0
    saved, expected = state_of("a", 10), losses_of("a")
    for source, step, devices in (("a", 10, 4), ("a", 10, 2), ("a", 10, 1), ("on1", 20, 8)):
        cut_back(source, name := f"on{devices}", step)
        here = (*options, "--parallel.devices", str(devices))
        if step == 10:
            args = ["tiny.py", "--name", name, *here]
            (cfg,) = pipeline.from_command_line(args, DEFAULT).stages
            prepared = loop.prepare(cfg)
            restored = {"params": prepared.state.params, "opt": prepared.state.opt}
            assert len(jax.tree.leaves(restored)[0].sharding.device_set) == devices
            prepared.checkpoints.close()
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
                item = "params/" if path[0].key == "params" else "train/['opt']"
                key = item + normal(jax.tree_util.keystr(path[1:]))
                np.testing.assert_array_equal(leaf, saved[key], key)
        assert run(*here, name=name) == 0
        found = losses_of(name)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def normal(path):
    """A path of attributes, indices and keys as that of nested dicts."""
    return re.sub(r"\.(\w+)|\[(\d+)\]", r"['\1\2']", path)


def test_a_signal_after_the_last_step_is_obeyed(here, monkeypatch):
    finish_saving = loop.Training.finish_saving

    def interrupted(self):
        finish_saving(self)
        os.kill(os.getpid(), signal.SIGTERM)
        while not self.signals.received:
            time.sleep(0.01)

    monkeypatch.setattr(loop.Training, "finish_saving", interrupted)
    assert run() == 143
    assert checkpoint.read_metadata("runs/a")["metrics"]["step"] == 6
    monkeypatch.setattr(loop.Training, "finish_saving", finish_saving)
    assert run() == 0 and any(record.get("finished") == 6 for record in records_of())
