"""The dial: models of several depths, and the line of their losses over compute in log-log.

    python benchmarks/dial.py

Every depth is trained by the rules of `jaxgpt/training/dial.py` on the Python standard library, as
a sweep: repeating the command resumes. It prints depth, size, tokens, FLOPs (`flops_per_token`) and
the loss on the whole validation set, fits log loss = a + b log FLOPs by least squares, and plots
it. Good rules keep all depths near one line.
"""

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from jaxgpt import config
from jaxgpt.training.sweep import sweep


@dataclass(frozen=True)
class Options:
    """What is trained."""

    depths: tuple[int, ...] = (2, 3, 4, 6)
    """Numbers of layers."""
    horizon: float = 0.3
    """Tokens per parameter."""
    config: str = "configs/default.py"
    """The config file."""
    runs: str = "runs"
    """The folder of runs."""
    name: str = "dial"
    """The name of the sweep."""
    dtype: str = "bfloat16"
    """The dtype of matrix products."""
    plot: str = ""
    """The file of the plot; by default fit.png in the sweep's folder."""


@dataclass(frozen=True)
class Measured:
    """A trained model."""

    depth: int
    width: int
    weights: int
    """Weights in matrix products."""
    tokens: int
    flops: float
    loss: float
    bits: float
    """Bits per byte."""
    seconds: float
    """Of all steps, without compilation and evaluation."""


def measure(run: Path, loss: float) -> Measured:
    """What a finished run has used and reached."""
    cfg = config.read(run / "config.json")
    tokens = cfg.train.steps * cfg.train.batch * cfg.context
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bits = [r["val_bits_per_byte"] for r in records if "val_bits_per_byte" in r][-1]
    flops = cfg.model.flops_per_token(cfg.context) * tokens
    seconds = sum(r["goodput"]["step"] for r in records if "goodput" in r)
    size = cfg.model.L, cfg.model.D, cfg.model.matmul_weights
    return Measured(*size, tokens, flops, loss, bits, seconds)


def fit(found: list[Measured]) -> tuple[float, float, np.ndarray]:
    """Slope and intercept of log loss over log FLOPs, and the residuals of log loss."""
    x = np.log([each.flops for each in found])
    y = np.log([each.loss for each in found])
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept), y - (slope * x + intercept)


def draw(found: list[Measured], slope: float, intercept: float, path: Path) -> None:
    """Plots losses and the fitted line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    flops = np.array([each.flops for each in found])
    line = np.geomspace(flops.min() / 1.5, flops.max() * 1.5)
    axes.plot(line, np.exp(intercept) * line**slope, color="#7b8794", linewidth=1.0)
    axes.plot(flops, [each.loss for each in found], "o", color="#c2410c")
    for each in found:
        axes.annotate(
            f"depth {each.depth}", (each.flops, each.loss), (6, 6), textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="validation loss")
    axes.set_title(f"loss = {np.exp(intercept):.3g} FLOPs^{slope:.3f}")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Trains, prints the table, and plots."""
    options = tyro.cli(Options)
    folder = Path(options.runs) / options.name
    shared = (
        *("--horizon", str(options.horizon), "--compute.dtype", options.dtype),
        *("--runs", options.runs, "--train.sample_tokens", "0"),
        *("--train.eval_every", "0", "--train.eval_batches", "0"),
    )
    depths = ("depth", *map(str, options.depths))
    if status := sweep(options.config, [depths], options=shared, name=options.name):
        sys.exit(status)
    points = json.loads((folder / "sweep.json").read_text())
    found = [measure(Path(point["run"]), point["loss"]) for point in points]
    found.sort(key=lambda each: each.depth)
    if len(found) < 2:
        sys.exit("a line needs two depths or more")
    slope, intercept, residuals = fit(found)
    print(
        "\ndepth  width    weights      tokens      FLOPs  seconds    loss  bits/byte    line"
        "  residual"
    )
    for each, residual in zip(found, residuals, strict=True):
        print(
            f"{each.depth:>5}  {each.width:>5}  {each.weights:>9,}  {each.tokens:>10,}  "
            f"{each.flops:>9.2e}  {each.seconds:>7.1f}  {each.loss:.4f}     {each.bits:.4f}  "
            f"{each.loss / np.exp(residual):.4f}  {residual:>+8.4f}"
        )
    path = Path(options.plot or folder / "fit.png")
    draw(found, slope, intercept, path)
    print(f"loss = {np.exp(intercept):.4g} x FLOPs^{slope:.4f}; drawn in {path}")
    print(
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()
