"""What a run shows and writes down: progress, metrics, where the time went, a picture of the loss.

`metrics.jsonl` always gets every record. TensorBoard and Weights & Biases are options that can never
stop a run: the first thing that goes wrong there is said once, and they are off.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BUCKETS = ("init", "compile", "data", "step", "save", "eval")

# Dense bfloat16 (V100 and T4: float16) peaks in TFLOP/s, without sparsity, from the makers' data
# sheets: cloud.google.com/tpu/docs for TPUs, NVIDIA's data sheets for GPUs.
PEAK_TFLOPS = {
    "TPU v2": 45,
    "TPU v3": 123,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla T4": 65,
    "NVIDIA L4": 121,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}


@dataclass(frozen=True)
class TelemetryConfig:
    """What is shown beside `metrics.jsonl`."""

    progress: Literal["auto", "lines", "none"] = "auto"
    """A live display on a terminal and lines elsewhere; lines always; or nothing."""
    tensorboard: bool = False
    """Also write TensorBoard's event files, with tensorboardX."""
    wandb: bool = False
    """Also send metrics to Weights & Biases (pip install wandb)."""
    wandb_project: str = "jaxgpt"
    """The project there."""


def peak_flops(device_kind: str) -> float | None:
    """A device's peak in FLOP/s by jax's name for its kind, or None where it is not known."""
    tflops = PEAK_TFLOPS.get(device_kind)
    return None if tflops is None else tflops * 1e12


class Goodput:
    """A clock with buckets: `with clock("eval"): ...`; time in an inner bucket is not the outer's.

    What is in no bucket is "other", so that the buckets add up to the wall time.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began = self._mark = now()
        self._stack = ["other"]
        self._seconds = dict.fromkeys((*BUCKETS, "other"), 0.0)

    @contextmanager
    def __call__(self, bucket: str) -> Iterator[None]:
        """Counts the time of a block in a bucket."""
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
        total = sum(seconds.values())
        rows = [f"  {name:<8}{s:>9.1f} s {s / total:>6.1%}" for name, s in seconds.items()]
        return "\n".join([*rows, f"  {'wall':<8}{total:>9.1f} s"])

    def _turn(self) -> None:
        now = self._now()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now


class Telemetry:
    """The records of one run, shown and written as they come; a context manager.

    `steps` is the number of steps in total, `start` how many are done; `flops_per_token` and the
    devices' kind make MFU where the peak is known. `clock` tells training time from all other.
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
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps, self.clock = folder, steps, clock
        self._tokens_per_step = tokens_per_step
        peak = peak_flops(devices[0].device_kind)
        self._tokens_per_peak = None if peak is None else peak * len(devices) / flops_per_token
        self._file = _reopen(folder / "metrics.jsonl", start)
        self._sinks = _sinks(folder, cfg)
        self._display = _display(cfg.progress, start, steps)
        self._last = (start, self._training_seconds())
        self._loss = self._val_loss = self._rate = math.nan

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes a record of a step: numbers by name. What is not finite is written as null."""
        self._loss = values.get("loss", self._loss)
        self._val_loss = values.get("val_loss", self._val_loss)
        self._record({"step": step, **values})
        for sink in list(self._sinks):
            try:
                sink(step, values)
            except Exception as error:
                self._drop(sink, error)

    def rate(self, step: int) -> dict[str, float]:
        """Tokens per second since this was last asked, training alone; and MFU if known."""
        last, seconds = self._last
        now = self._training_seconds()
        self._last = (step, now)
        if step == last:
            return {}
        self._rate = (step - last) * self._tokens_per_step / max(now - seconds, 1e-9)
        rates = {"tokens_per_second": self._rate}
        if self._tokens_per_peak is not None:
            rates["mfu"] = self._rate / self._tokens_per_peak
        return rates

    def show(self, step: int) -> None:
        """Brings the display up to a step."""
        left = (self.steps - step) * self._tokens_per_step / self._rate
        self._display.show(step, self._loss, self._val_loss, self._rate, left)

    def say(self, text: str) -> None:
        """Prints above the display."""
        self._display.say(text)

    def close(self) -> None:
        """Ends the display and writes where the time went."""
        self._display.close()
        self._record({"goodput": {k: round(v, 3) for k, v in self.clock.seconds().items()}})
        self._file.close()
        for sink in list(self._sinks):
            try:
                sink(None, {})
            except Exception as error:
                self._drop(sink, error)

    def _training_seconds(self) -> float:
        seconds = self.clock.seconds()
        return seconds["step"] + seconds["data"]

    def _record(self, record: dict[str, Any]) -> None:
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._file.write(json.dumps({**finite, "time": round(time.time(), 3)}) + "\n")
        self._file.flush()

    def _drop(self, sink: Any, error: Exception) -> None:
        self._sinks.remove(sink)
        print(f"warning: {sink.__name__} is off: {error}", file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was torn by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _reopen(path: Path, start: int) -> Any:
    """The file, holding one history: records after step `start` were of a run that was cut off."""
    kept = [record for record in read_metrics(path) if record.get("step", 0) <= start]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept if start))
    part.replace(path)
    return path.open("a")


def _sinks(folder: Path, cfg: TelemetryConfig) -> list[Callable[[int | None, dict], None]]:
    """Functions of (step, values) that pass records on; a step of None closes."""
    made = []
    for wanted, make in ((cfg.tensorboard, _tensorboard), (cfg.wandb, _wandb)):
        if wanted:
            try:
                made.append(make(folder, cfg))
            except Exception as error:
                print(f"warning: {make.__name__[1:]} is off: {error}", file=sys.stderr)
    return made


def _tensorboard(folder: Path, cfg: TelemetryConfig) -> Callable[[int | None, dict], None]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def tensorboard(step: int | None, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if step is None:
            writer.close()

    return tensorboard


def _wandb(folder: Path, cfg: TelemetryConfig) -> Callable[[int | None, dict], None]:
    import wandb as client

    run = client.init(
        project=cfg.wandb_project,
        name=folder.name,
        id=folder.name,
        dir=str(folder),
        resume="allow",
        settings=client.Settings(init_timeout=30, silent=True),
    )

    def wandb(step: int | None, values: dict[str, float]) -> None:
        if step is None:
            run.finish()
        else:
            run.log(values, step=step)

    return wandb


class _Lines:
    """A line for every call: for files and notebooks."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def show(self, step: int, loss: float, val_loss: float, rate: float, left: float) -> None:
        width = len(str(self.steps))
        parts = [f"step {step:>{width}}/{self.steps}", f"loss {loss:.4f}"]
        if math.isfinite(val_loss):
            parts.append(f"val {val_loss:.4f}")
        parts += [f"{rate:,.0f} tokens/s", f"{_clock(left)} left"]
        print(" | ".join(parts), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Live:
    """One line that changes in place, under everything else that is printed."""

    def __init__(self, start: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
        self.bar = Progress(*columns, expand=True)
        self.task = self.bar.add_task("", total=steps, completed=start, now="compiling")
        self.bar.start()

    def show(self, step: int, loss: float, val_loss: float, rate: float, left: float) -> None:
        now = f"loss {loss:.3f}"
        if math.isfinite(val_loss):
            now += f"  val {val_loss:.3f}"
        now += f"  {rate:,.0f} tok/s  {_clock(left)} left"
        self.bar.update(self.task, completed=step, now=now)

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.bar.stop()


class _Silent(_Lines):
    def show(self, *_: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def _display(progress: str, start: int, steps: int) -> Any:
    if progress == "none":
        return _Silent(steps)
    if progress == "auto" and sys.stdout.isatty():
        return _Live(start, steps)
    return _Lines(steps)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot(folder: Path) -> Path | None:
    """Draws training and validation loss over steps from `metrics.jsonl` into `loss.png`.

    Returns the picture's path, or None where there is no loss to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {
        "loss": {"label": "training", "color": "#9aa5b1", "linewidth": 1.0},
        "val_loss": {"label": "validation", "color": "#c2410c", "marker": "o", "markersize": 4},
    }
    drawn = False
    for name, style in styles.items():
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
            drawn = True
    if not drawn:
        return None
    axes.set(title=folder.name, xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path = folder / "loss.png"
    figure.savefig(path)
    return path
