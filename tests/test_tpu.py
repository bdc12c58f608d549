"""Without a TPU: the training step compiles for a slice of four v5e chips, by TPU's own compiler.

The compiler lives in a process of its own (benchmarks/tpu_compile.py), so that it never becomes
the backend of the other tests. Layers repeat, so one is compiled, with few rows and little effort.
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

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the compiler for TPU, is not installed",
    ),
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("name", CONFIGS),
]


@cache
def programs() -> dict[tuple[str, str], dict]:
    command = [sys.executable, "benchmarks/tpu_compile.py", "--layouts", *LAYOUTS]
    command += ["--configs", *(f"configs/{name}.py" for name in CONFIGS)]
    command += ["--layers", "1", "--rows", "2", "--format", "json"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "TPU_LOG_DIR": "disabled",
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {(Path(line["config"]).stem, line["layout"]): line for line in lines}


def test_attention_is_the_splash_kernel_forward_and_backward(name, layout):
    # One call forward; backward one for the queries, and one for the keys and values.
    assert programs()[name, layout]["splash_calls"] == 3


def test_the_whole_state_is_updated_in_place(name, layout):
    program = programs()[name, layout]
    assert program["leaves_in_place"] == program["leaves"]
