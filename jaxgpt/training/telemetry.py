"""Progress, metrics, goodput and loss curves of a run.

`metrics.jsonl` always gets every record. The display, TensorBoard and Weights & Biases never stop a
run: the first error of one of them, a network that hangs included, is printed once on stderr and
switches it off. TensorBoard and Weights & Biases work in threads of their own.
"""

import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import jax

from jaxgpt.errors import TrainingError
from jaxgpt.training.metrics import MetricsFile, read_metrics

BUCKETS = ("init", "compile", "data", "step", "save", "eval", "other")

# Peaks of one jax device in TFLOP/s: dense bfloat16 products summed in float32 (float16 on V100 and
# T4, which have no bfloat16), without sparsity. By `device_kind`, without NVIDIA's name before it.
# Sources: the "System architecture" pages of cloud.google.com/tpu/docs; NVIDIA's data sheets, which
# often print the figure with sparsity, twice this; for GeForce the GA102 and Ada white papers.
# A jax device is half a chip on TPU v2, v3 and 7x, a chip elsewhere.
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

# Seconds given to TensorBoard and W&B to begin or to finish.
PATIENCE = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TelemetryConfig:
    """What is shown beside `metrics.jsonl`."""

    progress: Literal["auto", "lines", "none"] = "auto"
    """A live display on a terminal and lines elsewhere; lines always; or nothing."""
    tensorboard: bool = False
    """Also write TensorBoard's event files, with tensorboardX."""
    wandb: bool = False
    """Also send metrics to Weights & Biases (pip install wandb; WANDB_MODE=offline keeps them)."""
    wandb_project: str = "jaxgpt"
    """The project there."""


def peak_flops(device_kind: str) -> float | None:
    """A device's peak in FLOP/s by jax's name for its kind, or None where it is not known."""
    tflops = PEAK_TFLOPS.get(device_kind.removeprefix("NVIDIA "))
    return None if tflops is None else tflops * 1e12


class Goodput:
    """A clock with buckets: `with clock("eval"): ...`; time in an inner bucket is not the outer's.

    What is in no bucket is "other", so that the buckets add up to the wall time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._mark = now()
        self._stack = ["other"]
        self._seconds = dict.fromkeys(BUCKETS, 0.0)

    @contextmanager
    def __call__(self, bucket: str) -> Iterator[None]:
        """Counts the time of a block in a bucket, one of `BUCKETS`."""
        if bucket not in BUCKETS:
            raise ValueError(f"no bucket {bucket!r}; there are {', '.join(BUCKETS)}")
        self._turn()
        self._stack.append(bucket)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds in every bucket until now."""
        self._turn()
        return dict(self._seconds)

    def table(self) -> str:
        """The buckets with their seconds and shares of the wall time."""
        seconds = self.seconds()
        wall = sum(seconds.values())
        return "\n".join(
            f"  {name:<8}{s:>9.1f} s {s / max(wall, 1e-9):>7.1%}"
            for name, s in [*seconds.items(), ("wall", wall)]
        )

    def _turn(self) -> None:
        now = self._now()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now


class Telemetry:
    """The records of one run, shown and written as they come; a context manager.

    `steps` is the number of steps in total, `start` how many are done; `flops_per_token` and the
    devices' kind make MFU where the peak is known. `clock` tells training time from all other.
    `config` is the run's, for Weights & Biases.
    Of several processes, only the first shows and writes.
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
        devices: list[Any],
        clock: Goodput,
        config: dict[str, Any],
    ) -> None:
        self.folder, self.steps, self.clock = folder, steps, clock
        self._tokens_per_step = tokens_per_step
        peak = peak_flops(devices[0].device_kind)
        self._peak_tokens = None if peak is None else peak * len(devices) / flops_per_token
        self._step = start
        self._measured = (start, self._training_seconds())
        self._loss = self._val_loss = self._rate = math.nan
        self._skipped = 0
        self._file: MetricsFile | None = None
        self._sinks: list[_Sink] = []
        self._display: Any = _Silent()
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

    def __exit__(self, *_: Any) -> None:
        self.close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes a record of a step: numbers by name. Numbers that are not finite become null.

        If the file cannot be written, a warning says so and the record waits in memory.
        """
        self._step = step
        self._skipped = int(values.get("skipped", self._skipped))
        self._loss = values.get("loss", self._loss)
        self._val_loss = values.get("val_loss", self._val_loss)
        self._record(values)
        for sink in self._sinks:
            sink.put(step, values)

    def rate(self, step: int) -> dict[str, float]:
        """Tokens per second since this was last asked, training alone; and MFU if known."""
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
        """Updates the display."""
        left = (self.steps - step) * self._tokens_per_step / self._rate
        numbers = _numbers(self._loss, self._val_loss, self._rate, left, self._skipped)
        self._on_display(lambda display: display.show(step, numbers))

    def say(self, text: str) -> None:
        """Prints above the display."""
        self._on_display(lambda display: display.say(text))

    def warn(self, text: str) -> None:
        """Prints a warning on stderr."""
        with suppress(OSError, ValueError):  # nobody reads it
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Writes the records that wait; raises TrainingError if they cannot be written."""
        if self._file is not None:
            waited = len(self._file.waiting)
            self._file.flush()
            if waited:
                self.warn(f"{waited} records that waited are written to {self._file.path}")

    def close(self) -> None:
        """Ends the display, writes where the time went, and waits for the options to finish."""
        self._on_display(lambda display: display.close())
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            seconds = self.clock.seconds()
            self._record({"goodput": {name: round(s, 3) for name, s in seconds.items()}})
            if self._file.waiting:
                self.warn(f"{len(self._file.waiting)} records are not in {self._file.path}")
            self._file.close()
            self._file = None

    def _training_seconds(self) -> float:
        seconds = self.clock.seconds()
        return seconds["step"] + seconds["data"]

    def _on_display(self, action: Callable[[Any], None]) -> None:
        """Uses the display, and switches it off if its terminal or pipe is gone."""
        try:
            action(self._display)
        except (OSError, ValueError) as error:
            self._display = _Silent()
            self.warn(f"the display is off: {error}")

    def _record(self, values: dict[str, Any]) -> None:
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
                self.warn(f"{error}; training goes on, and they are tried again")


class _Sink:
    """A place for records that may be missing, fail or hang: it is fed from a thread of its own.

    `connect` returns two functions: one takes (step, values), the other ends.
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
        """Passes a record on; never waits."""
        if self._works:
            try:
                self._queue.put_nowait((step, values))
            except queue.Full:
                self._switch_off("it does not keep up: 1000 records wait")

    def close(self) -> None:
        """Waits, but not forever, for the records that are on their way."""
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
        except BaseException as error:  # SystemExit too: nothing said here is for the run
            self._switch_off(" ".join(f"{type(error).__name__}: {error}".split()))

    def _switch_off(self, why: str) -> None:
        if self._works:
            self._works = False
            print(f"warning: {self.name} is off: {why}", file=sys.stderr)


def _tensorboard(folder: Path, start: int) -> tuple[Callable[..., None], Callable[[], None]]:
    # Not its SummaryWriter, which writes in a thread of its own: an error there, as on a full disk,
    # is a traceback, and then the process never ends.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    (folder / "tensorboard").mkdir(exist_ok=True)
    writer = event_file_writer.EventsWriter(
        str(folder / "tensorboard" / "events"), f".{os.getpid()}"
    )
    if start:  # steps of an earlier history, after `start`, are no longer shown
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
    folder: Path, project: str, config: dict[str, Any]
) -> tuple[Callable[..., None], Callable[[], None]]:
    # Silent, it neither asks for a key at the terminal nor prints into the display. The times end a
    # hanging network: the program's exit waits for W&B's own threads.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_INIT_TIMEOUT", f"{PATIENCE:g}")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{PATIENCE:g}")
    import wandb

    run = wandb.init(
        project=project, name=folder.name, group=folder.name, dir=str(folder), config=config
    )
    # A resumed run goes back some steps, which W&B's own step count may not.
    run.define_metric("*", step_metric="step")

    def send(step: int, values: dict[str, float]) -> None:
        run.log({"step": step, **values})

    return send, run.finish


class _Silent:
    """Shows nothing."""

    def show(self, step: int, numbers: list[str]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines(_Silent):
    """A line for every call: for files and notebooks."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        print("compiling the training step ...", flush=True)

    def show(self, step: int, numbers: list[str]) -> None:
        width = max(5, len(str(self.steps)))
        print(f"step {step:>{width}}/{self.steps} | {' | '.join(numbers)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class _Live(_Silent):
    """One line that changes in place, under everything else that is printed."""

    def __init__(self, start: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
        from rich.text import Text

        class Now(ProgressColumn):
            """The newest numbers; before the first, for how long the step has been compiled."""

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
    """What is known of loss, validation loss, speed, time left and skipped steps, as text."""
    known = [f"loss {loss:.4f}"]
    if not math.isnan(val_loss):
        known.append(f"val {val_loss:.4f}")
    if math.isfinite(rate):
        known += [f"{rate:,.0f} tok/s", f"{timedelta(seconds=round(left))} left"]
    if skipped:
        known.append(f"{skipped} skipped")
    return known


def _display(progress: str, start: int, steps: int) -> Any:
    if progress == "none":
        return _Silent()
    if progress == "auto" and sys.stdout.isatty():
        return _Live(start, steps)
    return _Lines(steps)


def before_and_after(folder: Path) -> str:
    """What was measured on held-out data at step 0 and at the end, as a table.

    Empty if nothing was measured at step 0, as in a run that starts from new parameters.
    """
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
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
    """Draws training and validation loss over steps from `metrics.jsonl` into `loss.png`.

    Returns the picture's path, or None where there is no loss to draw or no room for it, which is
    said on stderr: it never stops a run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        "loss": {"label": "training", "color": "#7b8794", "linewidth": 1.0},
        "val_loss": {"label": "validation", "color": "#c2410c", "marker": "o", "markersize": 4},
    }
    for name, style in styles.items():
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    if not axes.lines:
        return None
    axes.set(title=folder.name, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "loss.png"
    try:
        figure.savefig(path)
    except OSError as error:
        print(f"warning: {path} is not drawn: {error.strerror}", file=sys.stderr)
        return None
    return path
