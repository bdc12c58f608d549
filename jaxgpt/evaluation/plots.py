"""Pictures that are drawn with matplotlib, without its pyplot and its global state."""

import warnings
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
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


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
    axes.set(xlabel="predicted label", ylabel="true label")
    axes.set_title(folder.name, parse_math=False)
    axes.set_xticks(
        range(C), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(C), labels, parse_math=False)
    path = folder / "confusion.png"
    _save(figure, path)
    return path


def draw_attention(weights_LNTS: np.ndarray, tokens: Sequence[str], title: str, path: Path) -> None:
    """Draws attention weights into a file: a row of squares for each layer, one for each head.

    In a square, a row is a token and a column a token that it attends to.
    """
    L, N, T, _ = weights_LNTS.shape
    gap = max(1, T // 8)
    size = T + gap
    grid = np.full((L * size - gap, N * size - gap), np.nan)
    past_TS = np.tri(T, dtype=bool)
    for layer in range(L):
        for head in range(N):
            square = np.where(past_TS, weights_LNTS[layer, head], np.nan)
            grid[layer * size :, head * size :][:T, :T] = square
    inches = min(2.6, max(0.9, 13 / N))
    figure = new_figure(1.8 + inches * N, 1.4 + inches * L)
    axes = figure.add_subplot()
    shown = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_title(title, parse_math=False, pad=28)
    for head in range(N):
        axes.text(head * size + T / 2, -1, f"head {head}", ha="center", va="bottom", fontsize=8)
    for layer in range(L):
        middle = layer * size + T / 2
        axes.text(N * size - gap, middle, f"layer {layer}", rotation=270, va="center", fontsize=8)
    points = min(8.0, 60 * inches / T)
    readable = points > 4
    places = np.arange(T) if readable else np.arange(0)
    labels = [*tokens] if readable else []
    rows, columns = (np.concatenate([i * size + places for i in range(n)]) for n in (L, N))
    axes.set_yticks(rows, labels * L, fontsize=points, parse_math=False)
    axes.set_xticks(columns, labels * N, fontsize=points, parse_math=False, rotation=90)
    axes.tick_params(length=0)
    figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.06, label="attention weight")
    _save(figure, path)


def draw_next_tokens(
    tokens: Sequence[str], best: Sequence[Sequence[tuple[str, float]]], title: str, path: Path
) -> None:
    """Draws a table into a file: after each token, the most likely next ones.

    Args:
        tokens: The tokens of the prompt, a row each.
        best: For each of them tokens with their probabilities, the most likely first.
        title: The title.
        path: The file.
    """
    T, k = len(tokens), len(best[0])
    figure = new_figure(2 + 1.35 * k, 1.2 + 0.42 * T)
    axes = figure.add_subplot()
    shares = np.array([[probability for _, probability in row] for row in best])
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(T, k):
        token, probability = best[row][column]
        color = "white" if probability > 0.5 else "black"
        text = f"{token}  {probability:.1%}"
        cell = axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        cell.set_parse_math(False)
    axes.set_title(title, parse_math=False)
    axes.set_xticks(range(k), [f"{rank}." for rank in range(1, k + 1)])
    axes.set_yticks(range(T), tokens, parse_math=False)
    axes.set_ylabel("after the token")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    """Saves a figure; characters that the font lacks are boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path, bbox_inches="tight")
