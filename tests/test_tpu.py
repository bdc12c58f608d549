"""Without a TPU: what TPU's own compiler makes of the training step and of a step of writing.

The compiler runs in processes of its own (benchmarks/estimates.py for a slice of four v5e chips,
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

CONFIGS, LAYOUTS = ("default", "gpt2_124m", "colab_tpu"), ("data", "fsdp")
ROWS, CHIPS = 2, 4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPU, is not installed",
)
every_program = pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for layout in LAYOUTS for name in CONFIGS]
)


def compiled(benchmark: str, *options: str) -> tuple[list[dict], str]:
    """The lines of JSON that a benchmark prints, and what the compiler writes to standard error."""
    command = [sys.executable, f"benchmarks/{benchmark}.py", *options]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "TPU_LOG_DIR": "disabled",
    }
    command += ["--format", "json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [*map(json.loads, done.stdout.splitlines())], done.stderr


@cache
def programs() -> tuple[dict[tuple[str, str], dict], str]:
    small = f"--model.L 1 --train.micro 1 --train.batch {ROWS * CHIPS} --objective.chunk 64"
    lines, errors = compiled(
        *("estimates", "--devices", f"v5e-{CHIPS}", "--layouts", *LAYOUTS, "--configs", *CONFIGS),
        *("--search", "False", f"--options={small}"),
    )
    return {(line["config"], line["layout"]): line for line in lines}, errors


@every_program
def test_attention_is_the_splash_kernel_forward_and_backward(name, layout):
    found = programs()[0][name, layout]["program"]
    assert all(kernel.startswith("splash") for kernel in found["kernels"])
    assert found["kernel_calls"] == 2  # backward it is one kernel


@every_program
def test_the_whole_state_is_updated_in_place(name, layout):
    found = programs()[0][name, layout]["program"]
    assert found["state_leaves_in_place"] == found["state_leaves"]


@every_program
def test_no_array_has_the_logits_of_all_tokens(name, layout):
    found = programs()[0][name, layout]["program"]
    assert found["largest_array"] < found["logits"] / 2


@every_program
def test_the_prediction_agrees_with_the_compiler(name, layout):
    found = programs()[0][name, layout]
    program = found["program"]
    # The compiler also counts what stays on the chip. That is most of such a small program with
    # newer compilers, and with older ones little.
    assert 0 < program["moved_with_loops_counted_once"] < 1.1 * program["moved_by_compiler"]
    # The compiler knows no FLOPs of kernels, and FSDP may split what was traced as replicated.
    assert 0.7 < program["flops_in_products"] / found["step"]["flops"] < 1


def test_nothing_is_rematerialized_involuntarily():
    assert "nvoluntary full rematerialization" not in programs()[1]


@pytest.mark.parametrize(
    ("name", "layout"),
    # Under FSDP some matrices that the devices share for Muon are gathered by adding them up, which
    # is much for so small a model.
    [(n, layout) for layout in LAYOUTS for n in CONFIGS if (n, layout) != ("default", "fsdp")],
)
def test_each_gradient_is_added_up_over_the_chips_once(name, layout):
    found = programs()[0][name, layout]
    sent = found["program"]["sent"]
    if layout == "data":  # under FSDP newer compilers gather some weights in a loop
        assert found["program"]["sent_in_loops"] < 1e4
    # A ring of n devices sends 2 (n - 1) / n of the array, and half of it where each device gets a
    # part of the sum. Under FSDP there are both.
    added_up = (sent["all-reduce"] + sent.get("reduce-scatter", 0)) / (2 * (CHIPS - 1) / CHIPS)
    most = 4 * found["parameters"]
    least = most if layout == "data" else most / 2
    assert 0.999 * least < added_up < 1.001 * most


def test_a_step_of_writing_has_no_loops_and_multiplies_matrices():
    small = ("--batches", "1", "4", "--vocabulary", "1024", "--layers", "1")
    for program in compiled("tpu_decode", *small)[0]:
        assert program["loops"] == 0, "rows are written into the cache one after another"
        assert program["products"] == 7, "q, k, v, o, up, down and the output layer"
