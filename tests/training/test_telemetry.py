import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from jaxgpt.errors import TrainingError
from jaxgpt.streams import is_live
from jaxgpt.training import telemetry
from jaxgpt.training.telemetry import Goodput, Telemetry, TelemetryConfig


class Now:
    """A clock that a test advances."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def pass_(self, seconds):
        self.seconds += seconds


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


CPU = device("cpu")


def open_telemetry(folder, *, start=0, steps=2000, clock=None, devices=(CPU,), **options):
    return Telemetry(
        folder,
        TelemetryConfig(**{"progress": "none", **options}),
        start=start,
        steps=steps,
        tokens_per_step=1000,
        flops_per_token=1e9,
        devices=list(devices),
        clock=clock or Goodput(),
        config={"seed": 7},
    )


def records(folder):
    """The file's records, parsed strictly: Python's json also accepts NaN by default."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shakespeare"


def test_every_record_is_in_the_file_as_soon_as_it_is_logged(folder):
    with open_telemetry(folder) as log:
        log.log(1, {"loss": 3.5})
        (record,) = records(folder)
        assert (record["step"], record["loss"]) == (1, 3.5) and record["time"] > 1.7e9


def test_nan_and_infinity_are_written_as_null(folder):
    with open_telemetry(folder) as log:
        log.log(1, {"loss": math.nan, "grad_norm": math.inf, "rate": 1e-3})
    assert {"loss": None, "grad_norm": None, "rate": 1e-3}.items() <= records(folder)[0].items()


def test_a_resumed_file_holds_one_history(folder):
    with open_telemetry(folder) as log:
        for step in (10, 20, 30, 40):
            log.log(step, {"loss": float(step)})
    with open_telemetry(folder, start=20) as log:
        log.log(30, {"loss": -30.0})
    losses = [(r["step"], r["loss"]) for r in records(folder) if "loss" in r]
    assert losses == [(10, 10.0), (20, 20.0), (30, -30.0)]


def test_a_run_from_the_start_begins_a_new_file(folder):
    with open_telemetry(folder) as log:
        log.log(10, {"loss": 1.0})
    with open_telemetry(folder) as log:
        log.log(5, {"loss": 2.0})
    assert [r["step"] for r in records(folder) if "loss" in r] == [5]


def test_an_incomplete_last_line_is_ignored_and_not_continued(folder, caplog):
    with open_telemetry(folder) as log:
        log.log(10, {"loss": 1.0})
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().splitlines()[0] + '\n{"step": 11, "lo')
    with open_telemetry(folder, start=11) as log:
        log.log(12, {"loss": 2.0})
    assert [r["step"] for r in records(folder) if "loss" in r] == [10, 12]
    assert not caplog.text


def test_a_damaged_line_is_skipped_with_a_warning(folder, caplog):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n7\n{"step": 3}\n')
    assert telemetry.read_metrics(folder / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
    assert "line 2" in caplog.text and "line 3" in caplog.text and "line 4" not in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always full device")
def test_on_a_full_disk_records_are_kept_with_one_warning(folder, capsys):
    with open_telemetry(folder) as log:
        on_disk = log._file._file
        with Path("/dev/full").open("r+b", buffering=0) as log._file._file:
            for step in (7, 8):
                log.log(step, {"loss": 1.0})
            with pytest.raises(TrainingError, match="No space left"):
                log.flush()
        log._file._file = on_disk
        log.flush()
    assert [r["step"] for r in records(folder) if "loss" in r] == [7, 8]
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "2 pending records are now written" in said


def test_records_that_cannot_be_written_at_the_end_are_reported(folder, capsys):
    with Path("/dev/full").open("r+b", buffering=0) as full, open_telemetry(folder) as log:
        log._file._file.close()
        log._file._file = full
        log.log(7, {"loss": 1.0})
    assert "2 records are missing in" in capsys.readouterr().err


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("closed file")])
def test_a_display_on_a_closed_terminal_is_turned_off(folder, capsys, monkeypatch, error):
    def fail(*args, **settings):
        raise error

    with open_telemetry(folder) as log:
        monkeypatch.setattr(telemetry._Lines, "show", fail)
        log._display = telemetry._Lines(10)
        for step in (1, 2):
            log.log(step, {"loss": 1.0})
            log.show(step)
    assert capsys.readouterr().err.count("the display is off") == 1
    assert len([r for r in records(folder) if "loss" in r]) == 2


def test_skipped_steps_are_shown(folder, capsys):
    with open_telemetry(folder) as log:
        log._display = telemetry._Lines(10)
        log.log(1, {"loss": 1.0, "skipped": 0.0})
        log.show(1)
        log.log(2, {"loss": 1.0, "skipped": 3.0})
        log.show(2)
    first, second = (line for line in capsys.readouterr().out.splitlines() if "|" in line)
    assert "skipped" not in first and second.endswith("| 3 skipped")


def test_a_folder_that_cannot_be_written_is_a_training_error(folder):
    folder.touch()
    with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written.*set `runs`"):
        open_telemetry(folder)


def test_nested_buckets_add_up_to_the_wall_time():
    now = Now()
    clock = Goodput(now)
    now.pass_(1)
    with clock("step"):
        now.pass_(2)
        with clock("save"):
            now.pass_(4)
        with pytest.raises(KeyError), clock("eval"):
            now.pass_(8)
            raise KeyError
        now.pass_(16)
    now.pass_(32)
    seconds = clock.seconds()
    assert (seconds["step"], seconds["save"], seconds["eval"], seconds["other"]) == (18, 4, 8, 33)
    assert sum(seconds.values()) == now.seconds - 100


def test_the_table_shows_seconds_and_fractions_of_the_wall_time():
    now = Now()
    clock = Goodput(now)
    with clock("step"):
        now.pass_(75)
    with clock("save"):
        now.pass_(25)
    rows = [line.split() for line in clock.table().splitlines()]
    assert ["step", "75.0", "s", "75.0%"] in rows and ["save", "25.0", "s", "25.0%"] in rows
    assert rows[-1] == ["wall", "100.0", "s", "100.0%"]


def test_a_bucket_that_does_not_exist_is_rejected():
    with pytest.raises(ValueError, match="no bucket 'evil'; use one of init"), Goodput()("evil"):
        pass


def test_the_last_record_is_the_goodput(folder):
    now = Now()
    with open_telemetry(folder, clock=Goodput(now)) as log:
        with log.clock("step"):
            now.pass_(3)
        log.log(5, {"loss": 1.0})
    last = records(folder)[-1]
    assert last["step"] == 5 and last["goodput"]["step"] == 3
    assert set(last["goodput"]) == set(telemetry.BUCKETS)


def test_tokens_per_second_counts_only_training_time(folder):
    now = Now()
    with open_telemetry(folder, clock=Goodput(now)) as log:
        for bucket, seconds in {"compile": 60, "data": 1, "step": 4, "eval": 30, "save": 9}.items():
            with log.clock(bucket):
                now.pass_(seconds)
        assert log.rate(10) == {"tokens_per_second": 10 * 1000 / 5}
        with log.clock("step"):
            now.pass_(1)
        assert log.rate(20) == {"tokens_per_second": 10_000.0}
        assert log.rate(20) == {}


def test_mfu_is_the_fraction_of_the_peak_of_all_devices(folder):
    now = Now()
    devices = [device("NVIDIA H200")] * 4
    with open_telemetry(folder, clock=Goodput(now), devices=devices) as log:
        with log.clock("step"):
            now.pass_(2)
        # 4000 tokens x 1e9 FLOPs in 2 s, on 4 x 989e12 FLOP/s.
        assert log.rate(4)["mfu"] == pytest.approx(4e12 / 2 / (4 * 989e12))


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peaks_are_of_exactly_the_device_named(kind, tflops):
    peak = telemetry.peak_flops(kind)
    assert peak == (None if tflops is None else tflops * 1e12)


def test_without_a_known_peak_there_is_no_mfu(folder):
    now = Now()
    with open_telemetry(folder, clock=Goodput(now), devices=jax.devices()) as log:
        with log.clock("step"):
            now.pass_(1)
        assert set(log.rate(1)) == {"tokens_per_second"}


def test_without_a_terminal_a_line_is_printed_per_update(folder, capsys):
    now = Now()
    with open_telemetry(folder, clock=Goodput(now), progress="auto") as log:
        log.log(1, {"loss": 4.2})
        log.show(1)
        with log.clock("step"):
            now.pass_(10)
        log.log(100, {"loss": 3.2123, **log.rate(100)})
        log.log(100, {"val_loss": 3.3012})
        log.show(100)
        log.say("saved")
    assert capsys.readouterr().out.splitlines() == [
        "compiling the training step ...",
        "step     1/2000 | loss 4.2000",
        "step   100/2000 | loss 3.2123 | val_loss 3.3012 | 10,000 tok/s | 0:03:10 left",
        "saved",
    ]


def test_progress_none_shows_nothing(folder, capfd):
    with open_telemetry(folder, progress="none") as log:
        log.log(1, {"loss": 4.2})
        log.show(1)
        log.say("hello")
    assert capfd.readouterr() == ("", "")


def on_a_terminal(folder, **env):
    """What displays write to a terminal, with some environment variables."""
    pty = pytest.importorskip("pty")
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from jaxgpt.terminal import clock
        from tests.training.test_telemetry import open_telemetry
        with open_telemetry(Path({str(folder)!r}), progress="auto", steps=7) as log:
            log.log(3, {{"loss": 1.2345}})
            log.show(3)
            log.say("above")
        with clock("waiting"):
            pass
    """
    parent, child = pty.openpty()
    notebook = ("NO_COLOR", "JPY_PARENT_PID", "MPLBACKEND", "COLAB_RELEASE_TAG")
    usual = {k: v for k, v in os.environ.items() if k not in notebook}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=child,
        stderr=child,
        env={**usual, "TERM": "xterm", "COLUMNS": "80", **env},
    )
    os.close(child)
    shown = b""
    try:
        while part := os.read(parent, 4096):
            shown += part
    except OSError:  # on Linux: the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0, shown
    text = shown.decode()
    assert "3/7" in text.replace(" ", "") and "loss 1.2345" in text and "above" in text
    return text


def test_on_a_terminal_the_display_is_live(folder):
    text = on_a_terminal(folder)
    assert "\x1b[?25l" in text  # the cursor is hidden, and returned
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l")


def test_a_notebook_gets_plain_lines(folder):
    # What ipykernel sets for a command after "!"; rich then takes any output for a terminal.
    env = {"JPY_PARENT_PID": "1", "TERM": "xterm-color", "FORCE_COLOR": "1"}
    assert "\x1b" not in on_a_terminal(folder, **env)


@pytest.mark.parametrize("name", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "MPLBACKEND"])
def test_a_pseudo_terminal_of_a_notebook_is_not_live(monkeypatch, name):
    for other in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID", "MPLBACKEND"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Mock(isatty=lambda: True)
    assert is_live(terminal)
    monkeypatch.setenv(name, "module://matplotlib_inline.backend_inline")
    assert not is_live(terminal)


def events(folder):
    """Reads TensorBoard's scalars (tag, step, value); a record is length, CRC, protobuf, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_reads_what_was_logged(folder):
    with open_telemetry(folder, tensorboard=True) as log:
        log.log(1, {"loss": 3.5, "learning_rate": 0.25})
        log.log(2, {"loss": 3.25})
    assert events(folder) == [("loss", 1, 3.5), ("learning_rate", 1, 0.25), ("loss", 2, 3.25)]


def test_tensorboard_on_a_full_disk_is_turned_off(folder, capfd, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    def full(self, event):
        raise OSError(28, "No space left on device")

    with open_telemetry(folder, tensorboard=True) as log:
        log.log(1, {"loss": 3.5})
        while not (folder / "tensorboard").exists() or not events(folder):  # a thread writes
            time.sleep(0.01)
        monkeypatch.setattr(EventsWriter, "write_event", full)
        for step in (2, 3):
            log.log(step, {"loss": 3.5})
    said = capfd.readouterr().err
    assert said == "warning: tensorboard is off: OSError: [Errno 28] No space left on device\n"
    assert events(folder) == [("loss", 1, 3.5)]


class FakeRun:
    def __init__(self):
        self.logged, self.metrics, self.finished = [], [], False

    def define_metric(self, *args, **kwargs):
        self.metrics.append((args, kwargs))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """A fake module for `import wandb`; tests may replace its `init`."""
    module = types.ModuleType("wandb")
    module.run = FakeRun()
    module.init = lambda **kwargs: (setattr(module, "kwargs", kwargs), module.run)[1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return module


def test_wandb_gets_all_records_and_never_asks_for_a_key(folder, fake_wandb):
    with open_telemetry(folder, wandb=True, wandb_project="mine") as log:
        log.log(1, {"loss": 3.5})
    assert fake_wandb.kwargs["project"] == "mine" and fake_wandb.kwargs["name"] == "shakespeare"
    assert fake_wandb.kwargs["config"] == {"seed": 7}
    assert fake_wandb.run.logged == [{"step": 1, "loss": 3.5}]
    assert fake_wandb.run.metrics == [(("*",), {"step_metric": "step"})]
    assert fake_wandb.run.finished and os.environ["WANDB_SILENT"] == "true"


def fails(*_, **__):
    raise ConnectionError("no route\nto host")


def exits(*_, **__):
    sys.exit(1)


@pytest.mark.parametrize("failure", [fails, exits])
@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_wandb_failing_anywhere_is_one_warning(
    folder, fake_wandb, monkeypatch, capsys, failure, place
):
    monkeypatch.setattr(fake_wandb if place == "init" else fake_wandb.run, place, failure)
    with open_telemetry(folder, wandb=True) as log:
        for step in range(5):
            log.log(step, {"loss": 1.0})
    reason = "ConnectionError: no route to host" if failure is fails else "SystemExit: 1"
    assert capsys.readouterr().err == f"warning: wandb is off: {reason}\n"
    assert len(records(folder)) == 6


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_wandb_hanging_anywhere_does_not_hold_up_the_run(
    folder, fake_wandb, monkeypatch, capsys, place
):
    forever = threading.Event()
    monkeypatch.setattr(
        fake_wandb if place == "init" else fake_wandb.run, place, lambda *_, **__: forever.wait()
    )
    monkeypatch.setattr(telemetry, "PATIENCE", 0.1)
    with open_telemetry(folder, wandb=True) as log:
        for step in range(5):
            log.log(step, {"loss": 1.0})
    assert capsys.readouterr().err == "warning: wandb is off: it did not finish within 0.1 s\n"
    assert len(records(folder)) == 6
    forever.set()


def test_a_slow_sink_is_turned_off(folder, fake_wandb, monkeypatch, capsys):
    forever = threading.Event()
    monkeypatch.setattr(fake_wandb, "init", lambda **_: forever.wait())
    with open_telemetry(folder, wandb=True) as log:
        for step in range(1002):
            log.log(step, {"loss": 1.0})
    assert capsys.readouterr().err == (
        "warning: wandb is off: it is too slow, and 1000 records are waiting\n"
    )
    forever.set()


@pytest.mark.parametrize("name, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_turned_off(folder, monkeypatch, capsys, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with open_telemetry(folder, **{name: True}) as log:
        log.log(1, {"loss": 1.0})
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {name} is off: ModuleNotFoundError") and module in error
    assert len(error.splitlines()) == 1


def test_the_plot_shows_both_losses(folder, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    draw = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, **k: (drawn.update({k["label"]: a[1:]}), draw(*a, **k))[1]
    )
    with open_telemetry(folder) as log:
        for step in range(1, 101):
            loss = 1.5 + 3 * math.exp(-step / 20)
            log.log(step, {"loss": math.nan if step == 50 else loss})
            if step % 50 == 0:
                log.log(step, {"val_loss": loss + 0.1})
    picture = telemetry.plot(folder)
    assert picture == folder / "loss.png" and picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    steps, losses = drawn["training loss"]
    assert steps == tuple(s for s in range(1, 101) if s != 50)
    np.testing.assert_allclose(losses, 1.5 + 3 * np.exp(-np.array(steps) / 20))
    assert drawn["validation loss"][0] == (50, 100)


def test_without_a_loss_there_is_no_plot(folder):
    with open_telemetry(folder) as log:
        log.log(1, {"loss": math.nan})
    assert telemetry.plot(folder) is None and not (folder / "loss.png").exists()


def test_a_plot_that_cannot_be_written_is_a_warning(folder, capsys):
    with open_telemetry(folder) as log:
        log.log(1, {"loss": 2.0})
    (folder / "loss.png").mkdir()
    assert telemetry.plot(folder) is None
    assert "loss.png could not be written" in capsys.readouterr().err


def test_plotting_does_not_import_pyplot(folder):
    code = f"""
        import sys
        from pathlib import Path
        from jaxgpt.training import telemetry
        folder = Path({str(folder)!r})
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{{"step": 1, "loss": 2.0}}\\n')
        assert telemetry.plot(folder)
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
