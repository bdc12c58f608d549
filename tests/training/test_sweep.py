"""Sweeps: a grid of normal runs, which resume, fail one by one, and end in one table."""

import csv
import json
import shutil
import signal
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.cli import main
from jaxgpt.config import Config
from jaxgpt.errors import InputError
from jaxgpt.training import loop, sweep
from jaxgpt.training.sweep import Outcome, Point, draw, group, is_finished, plan, table
from tests.runs import assert_same_run, settle, spawn

RATES = ("--values", "optim.learning_rate", "1e-3", "1e-2")


def swept(*args, options=()):
    """The exit status of a sweep of the tiny config, whose folder is runs/s."""
    return main(["sweep", "tiny.py", *args, "--name", "s", "--", *options])


def results():
    return json.loads(Path("runs/s/sweep.json").read_text())


def name_of(rate, seed=1337):
    return f"s/optim.learning_rate={rate},seed={seed}"


@pytest.fixture(scope="session")
def swept_runs(tmp_path_factory):
    """The folder of a sweep of two learning rates, and what it printed; copy it to change it."""
    folder, printed = tmp_path_factory.mktemp("swept"), StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(printed):
        settle(folder, monkeypatch)
        assert swept(*RATES) == 0
    return folder / "runs/s", printed.getvalue()


@pytest.fixture
def done(here, swept_runs):
    """As `here`, after that sweep; what it printed."""
    folder, printed = swept_runs
    shutil.copytree(folder, "runs/s")
    return printed


@pytest.fixture
def counted(monkeypatch):
    """The names of the runs that are trained."""
    names = []
    original = loop.run

    def counting(cfg, signals):
        names.append(cfg.name)
        return original(cfg, signals)

    monkeypatch.setattr(loop, "run", counting)
    return names


def test_points_are_normal_runs_and_the_best_comes_first(done, runs):
    shutil.copytree(runs / "a", "runs/a")
    assert_same_run("a", name_of("0.01"), 6)
    first, second = results()
    assert first["loss"] < second["loss"] and first["seconds"] > 0 < first["tokens_per_second"]
    assert first["values"] == {"optim.learning_rate": 0.01} and first["seed"] == 1337
    (best,) = (line for line in done.splitlines() if line.endswith("<- best"))
    assert best.startswith("0.01 ") and f"{first['loss']:.4f}" in best
    assert Path("runs/s/sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(Path("runs/s/sweep.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == [first["loss"], second["loss"]]


def test_a_sweep_grows_without_training_anything_again(done, counted):
    assert swept(*RATES) == 0 and not counted
    assert swept(*RATES, "--seeds", "1337", "1") == 0
    assert counted == [name.partition("/")[2] for name in (name_of("0.001", 1), name_of("0.01", 1))]
    assert len(results()) == 4


@pytest.mark.slow
def test_a_stopped_sweep_resumes_bit_exactly(done, runs, counted, monkeypatch):
    shutil.rmtree(Path("runs") / name_of("0.01"))
    log = loop.telemetry.Telemetry.log

    def stopped(self, step, values):
        log(self, step, values)
        if step == 4 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as context:
        context.setattr(loop.telemetry.Telemetry, "log", stopped)
        assert swept(*RATES) == 128 + signal.SIGTERM
    assert not is_finished(Path("runs") / name_of("0.01"))
    assert swept(*RATES) == 0 and len(counted) == 2
    shutil.copytree(runs / "a", "runs/a")
    assert_same_run("a", name_of("0.01"), 6)


KILLED = """
import os, signal, sys
from jaxgpt import cli
from jaxgpt.training import loop
log = loop.telemetry.Telemetry.log
def killed(self, step, values):
    log(self, step, values)
    if step == 5 and "loss" in values and "0.01" in str(self.folder):
        os.kill(os.getpid(), signal.SIGKILL)
loop.telemetry.Telemetry.log = killed
sys.exit(cli.main(["sweep", "tiny.py", "--values", "optim.learning_rate", "1e-3", "1e-2",
                   "--name", "s"]))
"""


@pytest.mark.slow
def test_a_killed_sweep_resumes_bit_exactly(trained, counted):
    process = spawn(name="unused", program=("-c", KILLED))
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert swept(*RATES) == 0
    assert len(counted) == 1
    assert_same_run("a", name_of("0.01"), 6)


def test_a_point_that_fails_is_reported_and_the_others_are_trained(done, capsys):
    assert swept("--values", "optim.learning_rate", "1e30", "1e-2") == 1
    output = capsys.readouterr().out
    good, bad = results()
    assert good["values"] == {"optim.learning_rate": 0.01} and good["loss"] > 0
    assert "not finite" in bad["error"] and bad["error"] in output and "1 failed" in output


def test_two_fields_and_the_dial_make_a_grid(here):
    points = plan(
        "tiny.py",
        [("depth", "1", "2"), ("train.batch", "2", "4")],
        seeds=(0, 1),
        options=("--optim.name", "muon", "--device", "cpu", "--model.V", "28"),
    )
    shapes = [(p.cfg.model.L, p.cfg.train.batch, p.cfg.seed) for p in points]
    assert shapes == [(L, B, seed) for L in (1, 2) for B in (2, 4) for seed in (0, 1)]
    assert [p.values for p in points[::2]] == [
        {"depth": float(p.cfg.model.L), "train.batch": p.cfg.train.batch} for p in points[::2]
    ]
    assert len({p.cfg.folder for p in points}) == 8
    assert {p.cfg.folder.parent for p in points} == {Path("runs/tiny-sweep")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((), "nothing to vary"),
        ((("optim.learning_rate",),), "nothing to vary"),
        ((("train.batch", "2", "-3"),), "train.batch=-3"),
        ((("seed", "1", "2"),), "use --seeds"),
        ((("train.batch", "2"), ("train.batch", "4")), "there twice"),
        ((("optim.learning_rate", "1e-3", "0.001"),), "two points"),
        ((("data.paths", "a/b", "a b"),), "two points"),
    ],
)
def test_an_invalid_grid_is_refused_before_training(here, counted, values, message):
    with pytest.raises(InputError, match=message):
        sweep.sweep("tiny.py", values, name="s")
    assert not counted and not Path("runs").exists()


@pytest.mark.parametrize("values", [("optim.learning_rate", "1e-3", "fast"), ("optim.rate", "1")])
def test_values_are_checked_by_the_options_own_types(here, counted, capsys, values):
    with pytest.raises(SystemExit) as end:
        swept("--values", *values)
    assert end.value.code == 2 and not counted


def test_other_options_need_another_sweep(done, counted, capsys):
    assert swept(*RATES, options=("--train.batch", "4")) == 2
    assert "other options of train" in capsys.readouterr().err and not counted


def outcomes(losses):
    """Outcomes with these losses of several seeds, by the values of two fields."""
    return [
        Outcome(Point(dict(zip("ab", values, strict=True)), Config()), loss, loss)
        if loss
        else Outcome(Point(dict(zip("ab", values, strict=True)), Config()), error="failed")
        for values, some in losses.items()
        for loss in some
    ]


def test_rows_have_mean_and_standard_deviation_over_seeds():
    rows = group(outcomes({(1, "x"): (3.0, 4.0, 3.5), (2, "x"): (0,), (3, "x"): (1.0, 2.0, 0)}))
    assert [row.values["a"] for row in rows] == [3, 1, 2]
    assert rows[0].mean("loss") == 1.5 and rows[0].spread("loss") == np.std([1, 2], ddof=1)
    assert rows[1].spread("loss") == np.std([3, 4, 3.5], ddof=1)
    lines = table(rows).splitlines()
    assert "1.5000 ± 0.7071" in lines[1] and lines[1].endswith("<- best, 1 failed")
    assert "nan" not in lines[3]


@pytest.mark.parametrize(
    ("values", "scale"), [((1, 3, 9), "linear"), ((1, 3, 10), "log"), ((0, 10), "linear")]
)
def test_the_axis_of_a_decade_is_logarithmic(values, scale):
    figure = draw(group(outcomes({(value, "x"): (2.0,) for value in values})), "title")
    assert figure.axes[0].get_xscale() == scale


def test_there_is_a_line_for_each_value_of_the_second_field():
    losses = {(a, b): (a + ord(b),) for a in (3, 1, 2) for b in "xy"}
    (axes,) = draw(group(outcomes(losses)), "title").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["b x", "b y"]
    for bars in axes.containers:
        np.testing.assert_array_equal(bars.lines[0].get_xdata(), [1, 2, 3])
    assert draw(group(outcomes({(1, "x"): (0,)})), "title") is None
