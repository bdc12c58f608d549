"""Progress display, metrics, goodput and loss curves of a run.

`metrics.jsonl` always gets every record. The display, TensorBoard and Weights & Biases never stop a
run: the first error of one of them, including a network that hangs, is printed once to stderr and
turns it off. TensorBoard and Weights & Biases have threads of their own.
"""

import logging
import math
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import jax

from jaxgpt.errors import TrainingError
from jaxgpt.evaluation.plots import draw_loss
from jaxgpt.streams import is_live
from jaxgpt.training.metrics import MetricsFile, read_metrics

BUCKETS = ("init", "compile", "data", "step", "save", "eval", "other")

# Peak TFLOP/s of one JAX device by `device_kind` (without the prefix "NVIDIA "): dense bfloat16
# matrix products with float32 accumulation, or float16 on V100 and T4, which have no bfloat16.
# Sources: the "System architecture" pages of cloud.google.com/tpu/docs; NVIDIA's data sheets, which
# often give the figure with sparsity, twice this one; for GeForce the GA102 and Ada white papers.
# A JAX device is half a chip on TPU v2, v3 and 7x, and a whole chip elsewhere.
PEAK_TFLOPS = {
    "TPU v2": 45 / 2,
    "TPU v3": 123 / 2,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU7x": 2307 / 2,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-16GB": 112,
    "Tesla T4": 65,
    "A100-SXM4-40GB": 312,
    "A100-SXM4-80GB": 312,
    "A100-PCIE-40GB": 312,
    "A100 80GB PCIe": 312,
    "L4": 121,
    "L40S": 362,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100 80GB HBM3": 989,
    "H200": 989,
    "GeForce RTX 3090": 71,
    "GeForce RTX 4090": 165,
}

# Seconds that TensorBoard and W&B may take to start or to finish.
PATIENCE = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TelemetryConfig:
    """Where to show metrics in addition to `metrics.jsonl`."""

    progress: Literal["auto", "lines", "none"] = "auto"
    """The progress display. auto: a progress bar on a terminal, lines elsewhere and in notebooks;
    lines: always lines; none: no display."""
    tensorboard: bool = False
    """Whether to write event files for TensorBoard to the run's folder (needs tensorboardX)."""
    wandb: bool = False
    """Whether to log metrics to Weights & Biases (needs wandb; WANDB_MODE=offline keeps them on
    this machine)."""
    wandb_project: str = "jaxgpt"
    """The name of the Weights & Biases project."""


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of a device by its `device_kind`, or None if it is unknown."""
    tflops = PEAK_TFLOPS.get(device_kind.removeprefix("NVIDIA "))
    return None if tflops is None else tflops * 1e12


class Goodput:
    """Measures how much time a run spends on what: `with clock("eval"): ...`.

    Each moment counts for the innermost bucket, or for "other" outside of all, so the buckets add
    up to the wall time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._mark = now()
        self._stack = ["other"]
        self._seconds = dict.fromkeys(BUCKETS, 0.0)

    @contextmanager
    def __call__(self, bucket: str) -> Iterator[None]:
        """Counts the time of a `with` block for a bucket, one of `BUCKETS`."""
        if bucket not in BUCKETS:
            raise ValueError(f"no bucket {bucket!r}; use one of {', '.join(BUCKETS)}")
        self._update()
        self._stack.append(bucket)
        try:
            yield
        finally:
            self._update()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Returns the seconds in every bucket until now."""
        self._update()
        return dict(self._seconds)

    def table(self) -> str:
        """Formats the buckets' seconds and their fractions of the wall time as a table."""
        seconds = self.seconds()
        wall = sum(seconds.values())
        return "\n".join(
            f"  {name:<8}{s:>9.1f} s {s / max(wall, 1e-9):>7.1%}"
            for name, s in [*seconds.items(), ("wall", wall)]
        )

    def _update(self) -> None:
        """Adds the time since the last call to the current bucket."""
        now = self._now()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now


class Telemetry:
    """Writes and displays the metrics of one run; a context manager.

    With several processes, only the first one writes and displays.

    Args:
        folder: The run's folder.
        cfg: The display and loggers to use.
        start: The number of steps that are already done.
        steps: The total number of steps.
        tokens_per_step: The number of tokens in a step.
        flops_per_token: FLOPs of training on a token, for the model FLOPs utilization (MFU), which
            is reported if the devices' peak is known.
        devices: The devices used for training.
        clock: Distinguishes training time from other time.
        config: The run's config, for Weights & Biases.
    """

    def __init__(
        self,
        folder: Path,
        cfg: TelemetryConfig,
        *,
        start: int,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        devices: Sequence[jax.Device],
        clock: Goodput,
        config: Mapping[str, object],
    ) -> None:
        self.folder, self.steps, self.clock = folder, steps, clock
        self._tokens_per_step = tokens_per_step
        self._devices = devices
        peak = peak_flops(devices[0].device_kind)
        self._peak_tokens = None if peak is None else peak * len(devices) / flops_per_token
        self._step = start
        self._measured = (start, self._training_seconds())
        self._loss = self._val_loss = self._rate = math.nan
        self._skipped = 0
        self._file: MetricsFile | None = None
        self._sinks: list[_Sink] = []
        self._display = _Silent()
        if jax.process_index() == 0:
            self._file = MetricsFile(folder / "metrics.jsonl", start)
            if cfg.tensorboard:
                self._sinks.append(_Sink("tensorboard", lambda: _tensorboard(folder, start)))
            if cfg.wandb:
                self._sinks.append(
                    _Sink("wandb", lambda: _wandb(folder, cfg.wandb_project, config))
                )
            self._display = _display(cfg.progress, start, steps)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes a record of a step; NaN and infinities become null.

        If the file cannot be written, a warning is printed and the record is kept in memory.

        Args:
            step: The step.
            values: Numbers by name.
        """
        self._step = step
        self._skipped = int(values.get("skipped", self._skipped))
        self._loss = values.get("loss", self._loss)
        self._val_loss = values.get("val_loss", self._val_loss)
        self._record(values)
        for sink in self._sinks:
            sink.put(step, values)

    def begin(self, facts: Mapping[str, object]) -> None:
        """Writes a record of what this process trains, and on what, for reports."""
        devices = self._devices
        hardware = {
            "devices": len(devices),
            "device_kind": devices[0].device_kind,
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
        }
        self._record({"session": hardware | dict(facts)})

    def rate(self, step: int) -> dict[str, float]:
        """Returns training tokens per second since the last call, and the MFU if it is known.

        Only training time counts, without evaluation, saving and compilation.
        """
        last, seconds = self._measured
        now = self._training_seconds()
        if step == last or now == seconds:
            return {}
        self._measured = (step, now)
        self._rate = (step - last) * self._tokens_per_step / (now - seconds)
        rates = {"tokens_per_second": self._rate}
        if self._peak_tokens is not None:
            rates["mfu"] = self._rate / self._peak_tokens
        return rates

    def show(self, step: int) -> None:
        """Updates the progress display."""
        left = (self.steps - step) * self._tokens_per_step / self._rate
        numbers = _numbers(self._loss, self._val_loss, self._rate, left, self._skipped)
        self._on_display(lambda display: display.show(step, numbers))

    def say(self, text: str) -> None:
        """Prints a line above the progress display."""
        self._on_display(lambda display: display.say(text))

    def warn(self, text: str) -> None:
        """Prints a warning to stderr."""
        with suppress(OSError, ValueError):  # stderr is closed
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Writes pending records; raises TrainingError if they cannot be written."""
        if self._file is not None:
            waited = len(self._file.waiting)
            self._file.flush()
            if waited:
                self.warn(f"{waited} pending records are now written to {self._file.path}")

    def close(self) -> None:
        """Ends the display and loggers, and writes the goodput to `metrics.jsonl`."""
        self._on_display(lambda display: display.close())
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            seconds = self.clock.seconds()
            self._record({"goodput": {name: round(s, 3) for name, s in seconds.items()}})
            if self._file.waiting:
                self.warn(f"{len(self._file.waiting)} records are missing in {self._file.path}")
            self._file.close()
            self._file = None

    def _training_seconds(self) -> float:
        seconds = self.clock.seconds()
        return seconds["step"] + seconds["data"]

    def _on_display(self, action: Callable[["_Silent"], None]) -> None:
        """Calls the display; turns it off if its terminal or pipe is closed."""
        try:
            action(self._display)
        except (OSError, ValueError) as error:
            self._display = _Silent()
            self.warn(f"the display is off: {error}")

    def _record(self, values: Mapping[str, object]) -> None:
        if self._file is None:
            return
        record = {"step": self._step, **values, "time": round(time.time(), 3)}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        waited = bool(self._file.waiting)
        try:
            self._file.write(finite)
        except TrainingError as error:
            if not waited:
                self.warn(f"{error}; training continues and will retry")


class _Sink:
    """A logger such as TensorBoard in a thread of its own, because it may fail or hang.

    `connect` starts the logger and returns two functions: `send(step, values)` and `finish()`.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]],
    ) -> None:
        self.name = name
        self._connect = connect
        self._works = True
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(1000)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        """Queues a record; never waits."""
        if self._works:
            try:
                self._queue.put_nowait((step, values))
            except queue.Full:
                self._switch_off("it is too slow, and 1000 records are waiting")

    def close(self) -> None:
        """Waits up to `PATIENCE` seconds for queued records to be sent."""
        if self._works:
            with suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._switch_off(f"it did not finish within {PATIENCE:g} s")

    def _run(self) -> None:
        try:
            send, finish = self._connect()
            while (record := self._queue.get()) is not None:
                send(*record)
            finish()
        except BaseException as error:  # also SystemExit, which must not end the run
            self._switch_off(" ".join(f"{type(error).__name__}: {error}".split()))

    def _switch_off(self, why: str) -> None:
        if self._works:
            self._works = False
            print(f"warning: {self.name} is off: {why}", file=sys.stderr)


def _tensorboard(folder: Path, start: int) -> tuple[Callable[..., None], Callable[[], None]]:
    # tensorboardX's SummaryWriter is not used because it writes in a thread of its own: after an
    # error there, such as a full disk, the process never ends.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    (folder / "tensorboard").mkdir(exist_ok=True)
    writer = event_file_writer.EventsWriter(
        str(folder / "tensorboard" / "events"), f".{os.getpid()}"
    )
    if start:  # makes TensorBoard hide records after `start` of an earlier session
        writer.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def send(step: int, values: dict[str, float]) -> None:
        try:
            for name, value in values.items():
                scalar = summary.scalar(name, value)
                writer.write_event(Event(step=step, wall_time=time.time(), summary=scalar))
            writer.flush()
        except OSError:
            with suppress(OSError):
                writer.close()
            raise

    return send, writer.close


def _wandb(
    folder: Path, project: str, config: Mapping[str, object]
) -> tuple[Callable[..., None], Callable[[], None]]:
    # In silent mode W&B does not ask for an API key or print into the progress display. The
    # timeouts are needed because the exit of the program waits for W&B's threads.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_INIT_TIMEOUT", f"{PATIENCE:g}")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{PATIENCE:g}")
    import wandb

    run = wandb.init(
        project=project, name=folder.name, group=folder.name, dir=str(folder), config=config
    )
    # W&B's own step may not decrease, but a resumed run repeats some steps.
    run.define_metric("*", step_metric="step")

    def send(step: int, values: dict[str, float]) -> None:
        run.log({"step": step, **values})

    return send, run.finish


class _Silent:
    """A display that shows nothing."""

    def show(self, step: int, numbers: list[str]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines(_Silent):
    """A display that prints a line for every update, for files and notebooks."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        print("compiling the training step ...", flush=True)

    def show(self, step: int, numbers: list[str]) -> None:
        width = max(5, len(str(self.steps)))
        print(f"step {step:>{width}}/{self.steps} | {' | '.join(numbers)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class _Live(_Silent):
    """A display with a progress bar at the bottom of a terminal."""

    def __init__(self, start: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
        from rich.text import Text

        class Now(ProgressColumn):
            """The newest metrics; before the first ones, the time of compilation."""

            def render(self, task: Task) -> Text:
                return Text(task.fields["now"] or f"compiling {task.elapsed or 0:.0f} s")

        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), Now())
        self.bar = Progress(*columns, expand=True, refresh_per_second=2)
        self.task = self.bar.add_task("", total=steps, completed=start, now="")
        self.bar.start()

    def show(self, step: int, numbers: list[str]) -> None:
        self.bar.update(self.task, completed=step, now="  ".join(numbers))

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def _numbers(loss: float, val_loss: float, rate: float, left: float, skipped: int) -> list[str]:
    """Formats loss, validation loss, speed, time left and skipped steps, if they are known."""
    known = [f"loss {loss:.4f}"]
    if not math.isnan(val_loss):
        known.append(f"val_loss {val_loss:.4f}")
    if math.isfinite(rate):
        known += [f"{rate:,.0f} tok/s", f"{timedelta(seconds=round(left))} left"]
    if skipped:
        known.append(f"{skipped} skipped")
    return known


def _display(progress: str, start: int, steps: int) -> _Silent:
    """The progress display for `TelemetryConfig.progress`."""
    if progress == "none":
        return _Silent()
    if progress == "auto" and is_live(sys.stdout):
        return _Live(start, steps)
    return _Lines(steps)


def before_and_after(folder: Path) -> str:
    """Formats validation and test metrics before and after training as a table.

    The table is empty if nothing was measured at step 0, as in a run that starts from random
    parameters.
    """
    first: dict[str, object] = {}
    last: dict[str, object] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        measured = {k: v for k, v in record.items() if k.startswith(("val_", "test_"))}
        if not record["step"]:
            first |= measured
        last |= measured
    both = {
        name: (value, last[name])
        for name, value in first.items()
        if value is not None and last.get(name) is not None
    }
    width = max(map(len, both), default=0)
    rows = [f"  {name:<{width}} {old:>9.4f} {new:>9.4f}" for name, (old, new) in both.items()]
    return "\n".join([f"  {'':<{width}} {'before':>9} {'after':>9}", *rows] if rows else [])


def plot(folder: Path) -> Path | None:
    """Plots the training and validation loss in `metrics.jsonl` to `loss.png`.

    Args:
        folder: The run's folder.

    Returns:
        The plot's path, or None if there is no loss or the file cannot be written. The latter is a
        warning on stderr, because it must not stop a run.
    """
    records = read_metrics(folder / "metrics.jsonl")
    curves = {
        name: [(r["step"], r[name]) for r in records if r.get(name) is not None]
        for name in ("loss", "val_loss")
    }
    if not any(curves.values()):
        return None
    path = folder / "loss.png"
    try:
        draw_loss(curves["loss"], curves["val_loss"], folder.name, path)
    except OSError as error:
        print(f"warning: {path} could not be written: {error.strerror}", file=sys.stderr)
        return None
    return path
