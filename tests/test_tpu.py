"""Without a TPU: what TPU's own compiler makes of the training step and of a step of writing.

The compiler lives in processes of its own (benchmarks/tpu_compile.py for a slice of four v5e chips,
benchmarks/tpu_decode.py for one), so that it never becomes the backend of the other tests. Layers
repeat, so one is compiled, with few rows and little effort.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CONFIGS, LAYOUTS = ("default", "gpt2_124m", "modern"), ("data", "fsdp")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPU, is not installed",
)
every_program = pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for layout in LAYOUTS for name in CONFIGS]
)


def compiled(benchmark: str, *options: str) -> list[dict]:
    command = [sys.executable, f"benchmarks/{benchmark}.py", *options, "--layers", "1"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "TPU_LOG_DIR": "disabled",
    }
    command += ["--format", "json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [*map(json.loads, done.stdout.splitlines())]


@cache
def programs() -> dict[tuple[str, str], dict]:
    files = [f"configs/{name}.py" for name in CONFIGS]
    lines = compiled("tpu_compile", "--layouts", *LAYOUTS, "--configs", *files, "--rows", "2")
    return {(Path(line["config"]).stem, line["layout"]): line for line in lines}


@every_program
def test_attention_is_the_splash_kernel_forward_and_backward(name, layout):
    assert programs()[name, layout]["splash_calls"] == 2


@every_program
def test_the_whole_state_is_updated_in_place(name, layout):
    program = programs()[name, layout]
    assert program["leaves_in_place"] == program["leaves"]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_gradient_is_added_up_over_the_chips_once(name):
    program = programs()[name, "data"]
    assert program["reduced_in_loops"] < 1e4
    assert program["reduced"] == pytest.approx(program["parameters"], rel=1e-3)


def test_a_step_of_writing_has_no_loops_and_multiplies_matrices():
    for program in compiled("tpu_decode", "--batches", "1", "4", "--vocabulary", "1024"):
        assert program["loops"] == 0, "rows are written into the cache one after another"
        assert program["products"] == 7, "q, k, v, o, up, down and the output layer"
