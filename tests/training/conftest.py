"""A run that the tests of training share."""

import shutil

import pytest

from tests.runs import run, settle


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a config, a text, and nothing else."""
    settle(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of the runs after one, `a`; copy it to change it."""
    folder = tmp_path_factory.mktemp("a")
    with pytest.MonkeyPatch.context() as monkeypatch:
        settle(folder, monkeypatch)
        assert run() == 0
    return folder / "runs"


@pytest.fixture
def trained(here, runs):
    """As `here`, after a run."""
    shutil.copytree(runs, "runs")
