"""In the kernel of a notebook, the commands leave the kernel as it was."""

import os
import subprocess
import sys

import pytest

from tests.runs import TINY
from tests.tiny import ROOT

CELLS = f"""
%run {ROOT}/train.py tiny.py --name a
%%
import signal, sys
print("handler", signal.getsignal(signal.SIGINT), "output", type(sys.stdout).__module__)
%%
%run {ROOT}/train.py tiny.py --name a --require tpu
%%
!{sys.executable} {ROOT}/train.py tiny.py --name a --train.steps 8
%%
import os, threading
threading.Timer(8, os.kill, (os.getpid(), signal.SIGINT)).start()
%run {ROOT}/train.py tiny.py --name a --train.steps 100000 --train.log_every 1000
%%
print("the kernel", "lives")
"""

RUN = """
import sys
import nbclient, nbformat
cells = sys.stdin.read().strip().split("\\n%%\\n")
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True)
client.execute()
for cell in notebook.cells:
    print("In:", cell.source)
    for output in cell.outputs:
        print(output.get("text") or output.get("evalue") or "")
"""


@pytest.mark.slow
def test_training_in_a_kernel_prints_lines_and_leaves_the_kernel_alive(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "text.txt").write_text("a quick brown fox " * 400)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=CELLS,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, state, required, child, stopped, last = done.stdout.split("In: ")[1:]
    assert "step     6/6 | loss" in first and "\x1b" not in first
    assert "handler <built-in function default_int_handler>" in state
    assert "output ipykernel" in state
    assert "error: require=tpu, and JAX uses the CPU" in required
    assert "resumed after step 6" in child and "step     8/8" in child and "\x1b" not in child
    assert "is saved; the same command resumes" in stopped
    assert "the kernel lives" in last
