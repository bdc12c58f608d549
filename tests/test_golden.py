"""Runs and exports that earlier versions wrote still load, resume and give the same numbers.

`golden/make.py` says what the archives hold and how a new one is written.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.golden import make

ARCHIVES = sorted(Path(make.__file__).parent.glob("*.tar.xz"))
RUNS = [cfg.name for cfg in make.CONFIGS]


@pytest.fixture(params=ARCHIVES, ids=lambda archive: archive.name.split(".")[0])
def golden(request, tmp_path, monkeypatch):
    """What an archive expects; its files are in the working folder."""
    with tarfile.open(request.param) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    make.on_one_device(monkeypatch)
    return json.loads(Path("expected.json").read_text())


def test_there_are_golden_files():
    assert ARCHIVES


@pytest.mark.parametrize("name", RUNS)
def test_every_array_of_an_earlier_checkpoint_loads_bit_equal(golden, name):
    assert make.digests(name) == golden["arrays"][name]


# Matrix products differ in the last bits between processors and between versions of XLA.
@pytest.mark.parametrize("name", [*make.DECODERS, "hf", "peft"])
def test_an_earlier_run_or_export_loads_with_the_same_logits(golden, name):
    paths = {"hf": ("hf",), "peft": ("runs/plain", "peft")}
    logits = make.logits(*paths.get(name, (f"runs/{name}",)))
    np.testing.assert_allclose(logits, np.load("logits.npz")[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_an_earlier_run_resumes_with_the_same_losses(golden, capsys, name):
    assert make.resume(name) == 0
    assert f"resumed after step {make.STEPS}" in capsys.readouterr().out
    losses, expected = make.losses(name), golden["losses"][name]
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
