import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxgpt.evaluation.charts import Curve, as_file, line_chart, smooth

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(svg):
    """The points of each curve of a chart, in pixels."""
    lines = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [
        np.array([[float(x) for x in point.split(",")] for point in line.get("points").split()])
        for line in lines
    ]


def labels_of(svg):
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_points_lie_where_the_labels_of_the_axes_say():
    svg = line_chart([Curve("", [0, 4, 10], [1, 3, 2])], title="A", from_zero=True)
    root = ET.fromstring(svg)
    places = {(t.get("text-anchor"), t.text): t for t in root.iter(f"{SVG}text")}
    (line,) = lines_of(svg)
    assert line[1, 0] == pytest.approx(float(places["middle", "4"].get("x")), abs=0.1)
    # The label's baseline is 4 below the middle of its digits, which is the place of the value.
    assert line[1, 1] == pytest.approx(float(places["end", "3"].get("y")) - 4, abs=0.1)


def test_values_that_are_not_finite_are_left_out():
    svg = line_chart([Curve("", [1, 2, 3, 4], [1, math.nan, math.inf, 2])], title="A")
    (line,) = lines_of(svg)
    assert len(line) == 2 and np.isfinite(line).all()
    assert line_chart([Curve("", [1], [math.nan]), Curve("", [], [])], title="A") == ""


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [-3e9, 5e-9], [1e-6, 2e-6], [7e12, 7e12]])
def test_any_range_of_values_can_be_drawn(values):
    svg = line_chart([Curve("a", range(len(values)), values)], title="A")
    (line,) = lines_of(svg)
    assert len(line) == len(values) and (line >= 0).all()
    assert len(set(labels_of(svg))) >= 3


def test_a_long_curve_is_small_and_keeps_its_extremes():
    y = np.random.default_rng(0).normal(size=200_000)
    y[123_456] = 30
    svg = line_chart([Curve("", np.arange(len(y)), y)], title="A")
    (line,) = lines_of(svg)
    assert len(svg) < 40_000
    x, top = line[line[:, 1].argmin()]
    whole = line[-1, 0] - line[0, 0]
    assert (x - line[0, 0]) / whole == pytest.approx(123_456 / 200_000, abs=0.002)
    assert top < 60


def test_a_spike_in_the_background_does_not_flatten_the_other_curves():
    y = np.linspace(3, 2, 300)
    noisy = y.copy()
    noisy[100] = 1e6
    both = [Curve("each", range(300), noisy, kind="faint"), Curve("smoothed", range(300), y)]
    faint, line = lines_of(line_chart(both, title="A", height=320))
    assert np.ptp(line[:, 1]) > 150
    assert faint[:, 1].min() >= 30  # it ends at the border of the chart


def test_smoothing_is_a_moving_mean_that_keeps_the_ends():
    y = np.random.default_rng(0).normal(size=400)
    mean = np.ones(9) / 9  # 2% of 400 values
    found = np.array(smooth(y))
    expected = np.convolve(np.convolve(y, mean, "same"), mean, "same")
    np.testing.assert_allclose(found[12:-12], expected[12:-12])
    assert (found[0], found[-1]) == pytest.approx((y[0], y[-1]))
    assert smooth([]) == [] and smooth([4.0]) == [4.0]


def test_names_are_text_and_a_file_has_its_own_colors():
    name = "</text><script>alert(1)</script>&\ufffd"
    given = name.replace("\ufffd", "\x00")
    svg = as_file(line_chart([Curve(given, [1, 2], [3, 4], kind="points")] * 2, title=given))
    root = ET.fromstring(svg)
    assert name in labels_of(svg) and not list(root.iter(f"{SVG}script"))
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
