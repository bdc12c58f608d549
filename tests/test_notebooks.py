"""Every notebook runs from top to bottom in a kernel of its own, with few steps on little text."""

import os
import subprocess
import sys

import nbformat
import pytest

from notebooks import run
from tests.tiny import ROOT

NOTEBOOKS = run.find([])
SIZES = {
    1: "MERGES = 20",
    2: "STEPS = 3",
    3: "STEPS = 5",
    4: "STEPS = 2; MODEL = 'no_such_folder/gpt2'",
    5: "BASE_STEPS = 2; EPOCHS = 0.2",
    6: "BASE_STEPS = STEPS = 2; JUDGED = 6",
    7: "BASE_STEPS = STEPS = DPO_STEPS = GRPO_STEPS = 2",
    8: "STEPS = 2",
}

# Three packages of the library instead of all, and less to compile than Muon for a larger model.
SMALL = """
from pathlib import Path as _Path
import jaxgpt.config
from jaxgpt.data import sources as _sources, synthetic as _synthetic
_root, _files = _sources.standard_library()
_files = tuple(f for f in _files if _Path(f).parent.name in ("asyncio", "email", "json"))
_sources.standard_library = _synthetic.standard_library = lambda: (_root, _files)
def _read(path, read=jaxgpt.config.read):
    cfg = read(path).replace(optim={"name": "adamw", "warmup": 1}, train={"eval_batches": 1})
    sizes = {"L": 2, "D": 64, "N": 2, "F": 64}
    return cfg if cfg.start else cfg.replace(model=sizes, tokenizer={"vocab_size": 512})
jaxgpt.config.read = _read
"""


def test_there_are_eight_notebooks_and_each_has_its_sizes():
    assert [int(path.name[0]) for path in NOTEBOOKS] == [*SIZES]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    number = int(path.name[0])
    code = f"RUNS = {str(tmp_path / 'runs')!r}; {SIZES[number]}{SMALL if number > 2 else ''}"
    command = [sys.executable, ROOT / "notebooks" / "run.py", str(number)]
    command += ["--code", code, "--to", str(tmp_path)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    env = {**os.environ, "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_complete(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [dict(cell) for cell in notebook.cells]
    run.write_links(notebook, path.name)
    assert cells == [dict(cell) for cell in notebook.cells], "python notebooks/run.py --links"
    assert [cell.metadata.get("tags") for cell in notebook.cells[:4]] == [
        *(["badge"], None, ["setup"], ["parameters"]),
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any({"image/png", "text/html"} & {*output.get("data", {})} for output in outputs)
    assert path.stat().st_size < 300_000
