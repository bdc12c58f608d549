"""Pictures that are drawn with matplotlib, without its pyplot and its global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[object, object]]


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_loss(training: Points, validation: Points, title: str, path: Path) -> None:
    """Draws the training and the validation loss, (step, loss) each, into a file."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    if training:
        points = zip(*training, strict=True)
        axes.plot(*points, label="training loss", color="#7b8794", linewidth=1.0)
    if validation:
        points = zip(*validation, strict=True)
        axes.plot(*points, label="validation loss", color="#c2410c", marker="o", markersize=4)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_confusion(confusion: np.ndarray, labels: Sequence[str], folder: Path) -> Path:
    """Draws a confusion matrix [C, C], rows the true classes, into `confusion.png`."""
    C = len(labels)
    figure = new_figure(2.5 + 0.6 * C, 2.2 + 0.6 * C)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    axes.set(xlabel="predicted label", ylabel="true label", title=folder.name)
    axes.set_xticks(range(C), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(C), labels)
    path = folder / "confusion.png"
    figure.savefig(path)
    return path
