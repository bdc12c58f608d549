"""Line charts as SVG, whose colors follow the reader's light or dark theme.

A chart is inserted into an HTML page that has the CSS of `STYLE`, or is written to a file of its
own (`as_file`). It has a few kilobytes, however long the curves are, and no script.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from typing import Literal

import numpy as np

from jaxgpt.display import printable

COLORS = 8
"""Curves with more colors than these begin again with the first, dashed."""

STYLE = """
:root{--ink:#1f2933;--muted:#5b6876;--line:#d9dee4;--paper:#fff;
--c0:#2563eb;--c1:#c2410c;--c2:#15803d;--c3:#7c3aed;
--c4:#be185d;--c5:#0e7490;--c6:#a16207;--c7:#57534e}
@media screen and (prefers-color-scheme:dark){
:root{--ink:#e4e8ec;--muted:#9aa7b4;--line:#333d48;--paper:#14181d;
--c0:#6ea8fe;--c1:#fb923c;--c2:#4ade80;--c3:#c4b5fd;
--c4:#f472b6;--c5:#22d3ee;--c6:#facc15;--c7:#d6d3d1}}
.chart{font:13px system-ui,sans-serif;display:block;width:100%;height:auto}
.chart text{fill:var(--muted)}
.chart .title{fill:var(--ink);font-weight:600;font-size:14px}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart polyline{fill:none;stroke-linejoin:round}
.chart .curve{stroke-width:2}
.chart .faint{stroke-width:1;opacity:.35}
.chart .dashed{stroke-dasharray:6 4}
.chart .dot{stroke:var(--paper);stroke-width:1.5}
"""
STYLE += "".join(
    f".chart .s{n}{{stroke:var(--c{n})}}.chart .f{n}{{fill:var(--c{n})}}\n" for n in range(COLORS)
)


@dataclass(frozen=True)
class Curve:
    """A curve of a chart; points that are not finite are left out."""

    name: str
    """Its name in the legend; empty: it is not there."""
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    """The number of its color; curves with the same one belong together."""
    kind: Literal["line", "faint", "points"] = "line"
    """faint: a thin line in the background, as for values before smoothing; points: a line with a
    dot at every point, which shows its value when the pointer is above it."""


def smooth(values: Sequence[float], fraction: float = 0.02) -> list[float]:
    """The centered moving mean over a fraction of the values, applied twice.

    Near both ends the window shrinks, so the first and the last value stay what they are. Values
    must be finite.
    """
    y = np.asarray(values, float)
    n = len(y)
    place = np.arange(n)
    half = np.minimum(math.ceil(n * fraction / 2), np.minimum(place, n - 1 - place))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(y)])
        y = (sums[place + half + 1] - sums[place - half]) / (2 * half + 1)
    smoothed: list[float] = y.tolist()
    return smoothed


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str = "step",
    from_zero: bool = False,
    width: int = 720,
    height: int = 320,
) -> str:
    """A chart of curves, as an `<svg>` element; empty if there is nothing to draw.

    The range of values is that of all curves that are not faint, and of all but the highest and
    the lowest percent of the faint ones, so that a single spike does not flatten the rest.

    Args:
        curves: The curves.
        title: The title above the chart.
        x_label: The label of the x axis.
        from_zero: Whether the y axis begins at 0.
        width: The width of the drawing; a page scales it. Text has a height of about 13.
        height: Its height.
    """
    data = [(curve, *_finite(curve)) for curve in curves]
    data = [(curve, x, y) for curve, x, y in data if len(x)]
    if not data:
        return ""
    low_x, high_x = _widened(min(x.min() for _, x, _ in data), max(x.max() for _, x, _ in data))
    low_x = 0.0 if 0 < low_x < high_x / 2 else low_x
    spans = [
        np.percentile(y, [1, 99]) if curve.kind == "faint" else (y.min(), y.max())
        for curve, _, y in data
    ]
    low, high = min(low for low, _ in spans), max(high for _, high in spans)
    low, high = _widened(0.0 if from_zero and low >= 0 else low, high)
    margin = (high - low) * 0.05
    low, high = low if from_zero and low == 0 else low - margin, high + margin

    legend, rows = _legend([curve for curve, *_ in data], width)
    ticks = _ticks(low, high, max(3, height // 60))
    left = 16 + 7.4 * max(len(label) for _, label in ticks)
    top, right, bottom = 30 + 20 * rows, width - 14, height - 40

    def at_x(x: np.ndarray | float) -> np.ndarray:
        return left + (np.asarray(x) - low_x) / (high_x - low_x) * (right - left)

    def at_y(y: np.ndarray | float) -> np.ndarray:
        return bottom - (np.asarray(y) - low) / (high - low) * (bottom - top)

    parts = [f'<text class="title" x="0" y="16">{plain(title)}</text>', *legend]
    for value, label in ticks:
        line = f'y1="{at_y(value):.1f}" y2="{at_y(value):.1f}"'
        parts.append(f'<line class="grid" x1="{left:.0f}" x2="{right}" {line}/>')
        parts.append(
            f'<text x="{left - 8:.0f}" y="{at_y(value) + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for value, label in _ticks(low_x, high_x, max(3, int(right - left) // 90)):
        parts.append(
            f'<text x="{at_x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
        )
    parts.append(
        f'<text x="{(left + right) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"{plain(x_label)}</text>"
    )
    for curve, x, y in sorted(data, key=lambda one: one[0].kind != "faint"):
        inside = at_x(x), np.clip(at_y(y), top, bottom)
        parts += _drawn(curve, *_thinned(*inside, int(right - left)))
        if curve.kind == "points" and len(x) <= 200:
            parts += _dots(curve, x, y, *inside)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{plain(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def plain(text: str) -> str:
    """Text for HTML and SVG: escaped, without control characters."""
    return escape(printable(text))


def title_of(svg: str) -> str:
    """The title of a chart."""
    return unescape(svg.partition('aria-label="')[2].partition('"')[0])


def as_file(svg: str) -> str:
    """The content of an SVG file with one chart and its colors, on a background of its own."""
    start, _, rest = svg.partition(">")
    return f"{start}><style>{STYLE}.chart{{background:var(--paper)}}</style>{rest}\n"


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    good = np.isfinite(x) & np.isfinite(y)
    return x[good], y[good]


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return float(low), float(high)
    return float(low) - (abs(low) / 2 or 1), float(high) + (abs(high) / 2 or 1)


def _ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Round values in a range with their labels, about `most` of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, _label(n * step, step)) for n in numbers]


def _label(value: float, step: float) -> str:
    """A value as the label of an axis whose values are `step` apart."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= unit / 10 and abs(value) >= unit:
            return f"{value / unit:.{0 if step >= unit else 1}f}{suffix}"
    if step < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _legend(curves: Sequence[Curve], width: int) -> tuple[list[str], int]:
    """The legend's elements, and the number of its rows; curves are named if there are several."""
    named = [curve for curve in curves if curve.name]
    if len(curves) < 2:
        return [], 0
    parts, x, row = [], 0.0, 1
    for curve in named:
        name = curve.name if len(curve.name) <= 40 else f"{curve.name[:37]}..."
        wide = 46 + 7.4 * len(name)
        if x and x + wide > width:
            x, row = 0.0, row + 1
        y = 16 + 20 * row
        parts.append(
            f'<line x1="{x:.0f}" x2="{x + 22:.0f}" y1="{y - 4}" y2="{y - 4}" {_class(curve)}/>'
        )
        parts.append(f'<text x="{x + 28:.0f}" y="{y}">{plain(name)}</text>')
        x += wide
    return parts, row if named else 0


def _class(curve: Curve) -> str:
    dashed = " dashed" if curve.color >= COLORS else ""
    kind = "faint" if curve.kind == "faint" else "curve"
    return f'class="{kind} s{curve.color % COLORS}{dashed}"'


def _thinned(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The points of a long curve that decide how it looks: the extremes in every column."""
    if len(x) <= 2 * columns:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), columns):
        kept |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def _drawn(curve: Curve, x: np.ndarray, y: np.ndarray) -> list[str]:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return [f'<polyline {_class(curve)} points="{points}"/>']


def _dots(
    curve: Curve, x: np.ndarray, y: np.ndarray, left: np.ndarray, top: np.ndarray
) -> list[str]:
    return [
        f'<circle class="dot f{curve.color % COLORS}" cx="{a:.1f}" cy="{b:.1f}" r="4">'
        f"<title>{plain(curve.name)} {value:.4g} at {where:.6g}</title></circle>"
        for where, value, a, b in zip(x, y, left, top, strict=True)
    ]
