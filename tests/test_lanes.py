"""The versions that are tested: one table, with which requirements and documentation agree."""

import json
import re

import pytest

from jaxgpt import lanes
from tests.tiny import ROOT


def test_the_floors_are_those_of_the_requirements():
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    for name, floor in lanes.FLOORS.items():
        assert name in ("python", "jaxlib") or f"{name}>={floor}" in requirements
        oldest = min((lane[name] for lane in lanes.LANES.values()), key=lanes.release)
        assert lanes.release(floor) <= lanes.release(oldest)


def test_the_documentation_shows_the_lanes():
    page = (ROOT / "docs/parallelism.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", page, re.MULTILINE)
    shown = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    for name, lane in lanes.LANES.items():
        assert shown[name] == [lane[one] for one in lane if one != "jaxlib"]


def test_what_an_installation_would_move_is_named(tmp_path, capsys):
    report = tmp_path / "report.json"
    for names, moved in ((["jaxgpt", "rich"], []), (["jaxgpt", "NumPy", "jax"], ["numpy", "jax"])):
        report.write_text(json.dumps({"install": [{"metadata": {"name": n}} for n in names]}))
        assert lanes.moved(report) == moved
        assert lanes.main("moved", str(report)) == bool(moved)
    assert capsys.readouterr().out == "numpy\njax\n"


def test_a_lane_is_compared_with_what_is_installed(monkeypatch, capsys):
    lane = lanes.LANES["colab"]
    monkeypatch.setattr(lanes.platform, "python_version_tuple", lambda: ("3", "13", "5"))
    monkeypatch.setattr(lanes, "installed", lambda name: lane[name])
    assert lanes.main("check", "colab") == 0
    monkeypatch.setattr(lanes, "installed", lambda name: "0.8.0" if name == "jax" else lane[name])
    assert lanes.main("check", "colab") == 1
    assert capsys.readouterr().out == "jax is 0.8.0, and lane colab of jaxgpt/lanes.py has 0.7.2\n"


@pytest.mark.parametrize(
    ("python", "jax", "lane"),
    [
        ("3.13.0", "0.7.2", "colab"),
        ("3.13.2", "0.13.0", "newest"),
        ("3.13.2", "0.6.0", "colab"),
        ("3.11.7", "0.6.0", "python311"),
        ("3.12.1", "0.11.2", "python311"),
    ],
)
def test_the_closest_lane_fits_the_python(python, jax, lane):
    assert lanes.closest(python, jax) == lane
