"""Runs of two processes with two devices each: how they end, and who resumes them."""

import random
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.training import checkpoint
from tests.runs import (
    ALL,
    assert_same_run,
    cut_back,
    losses_of,
    run,
    settle,
    spawn,
    spawn_two,
    state_of,
    wait_for_step,
)

QUICK = """
import os, signal, sys, jax, train
from jaxgpt import processes
from jaxgpt.training import checkpoint, loop
processes.BEAT, processes.SILENCE, processes.MOMENT, processes.VISIBLE = 1.0, 8.0, 1.0, 3.0
"""

# Process 1 is killed at step 5, while step 6 is saved, or while it is evaluated.
KILLED = """
def dies(owner, name, when):
    original = getattr(owner, name)
    def dying(self, *args):
        if jax.process_index() == 1 and when(self, *args):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)
    setattr(owner, name, dying)
place = sys.argv.pop(1)
if place == "step":
    dies(loop.telemetry.Telemetry, "log", lambda self, step, values: step == 5)
elif place == "save":
    dies(checkpoint.Checkpoints, "_finish", lambda self, step, files: step == 6)
else:
    dies(loop.Training, "measure", lambda self, name: self.step == 6)
"""
TRAIN = "sys.exit(train.main(sys.argv[1:]))"


def outputs_of(processes):
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "save", "evaluation"])
def test_a_process_that_is_killed_is_named_by_the_other_which_ends(here, place):
    options = ("--train.steps", "1000", "--model.dropout", "0")
    both = spawn_two(*options, name="a", program=("-c", QUICK + KILLED + TRAIN, place))
    survivor, _ = outputs_of(both)
    assert [process.returncode for process in both] == [1, -signal.SIGKILL], survivor
    last = survivor.splitlines()[-1]
    assert last.startswith(f"error: process 1 on {socket.gethostname()} has ended"), survivor
    assert "no sign of life" in last and "start all processes again" in last
    steps = checkpoint.steps_in(Path("runs/a/checkpoints"))
    assert steps in ([3], [3, 6]) if place == "evaluation" else steps == [3]
    if place == "save":
        assert run("--train.steps", "7", "--model.dropout", "0") == 0
        assert checkpoint.read_metadata("runs/a")["lineage"]["resumed_after"] == [3]
        assert sorted(losses_of("a")) == list(range(1, 8))


def spawn_apart(folder, monkeypatch, program):
    """As `spawn_two`, but each process works in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = []
    for number in "01":
        (folder / number).mkdir()
        settle(folder / number, monkeypatch)
        options = ("--parallel.processes", "2", "--parallel.coordinator", address)
        options = (*ALL, *options, "--parallel.process", number)
        both.append(spawn(*options, name="a", devices=2, program=("-c", program)))
    return both


@pytest.mark.slow
def test_hosts_without_a_shared_folder_are_refused_at_the_start(tmp_path, monkeypatch):
    both = spawn_apart(tmp_path, monkeypatch, QUICK + TRAIN)
    outputs = outputs_of(both)
    assert [process.returncode for process in both] == [2, 2], outputs
    for number, output in enumerate(outputs):
        assert f"error: {tmp_path / str(number) / 'runs/a'} is not shared" in output
        assert "process 1 (" in output and "did not see a file" in output
    assert not list(tmp_path.glob("*/runs/*"))


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other_with_its_message(tmp_path, monkeypatch):
    blind = "processes.check_shared = lambda folder: None\n"
    no_text = "if sys.argv[-1] == '1': os.remove('text.txt')\n"
    both = spawn_apart(tmp_path, monkeypatch, QUICK + blind + no_text + TRAIN)
    outputs = outputs_of(both)
    assert [process.returncode for process in both] == [1, 2], outputs
    assert "error: text.txt does not exist" in outputs[1]
    assert "error: process 1 on " in outputs[0] and "text.txt does not exist" in outputs[0]


def spawn_by_slurm(*options, name):
    """As `spawn_two`, with the variables that Slurm's srun sets, from which JAX finds the rest."""
    job = {"JOB_ID": random.randrange(2**12), "NTASKS": 2, "STEP_NODELIST": "localhost"}
    both = []
    for number in (0, 1):
        with pytest.MonkeyPatch.context() as monkeypatch:
            for variable, value in {**job, "PROCID": number, "LOCALID": number}.items():
                monkeypatch.setenv(f"SLURM_{variable}", str(value))
            both.append(spawn(*ALL, "--parallel.processes", "0", *options, name=name, devices=2))
    return both


@pytest.mark.slow
def test_two_processes_and_one_resume_each_other(here):
    """Bit-exactly in the same processes, and up to rounding in another number of them.

    One of the runs finds its processes by the variables of a Slurm job.
    """
    exact = ("--model.dropout", "0")
    split = (*exact, "--parallel.data", "2", "--parallel.fsdp", "2")
    split += ("--train.sample_tokens", "4", "--train.prompt", "fox")
    assert run(*exact, "--parallel.devices", "4", name="alone") == 0

    def train_together(name, *options, start=spawn_two):
        both = start(*split, *options, name=name)
        outputs = outputs_of(both)
        assert [process.returncode for process in both] == [0, 0], outputs
        for line in ("loss curve", "to use the model", "report"):
            assert line in outputs[0] and line not in outputs[1]

    train_together("together")
    cut_back("together", "again", 3)
    train_together("again")
    assert_same_run("together", "again", 6)

    cut_back("alone", "joined", 3)
    train_together("joined", "--checkpoint.minutes", "1e-9", start=spawn_by_slurm)
    assert checkpoint.steps_in(Path("runs/joined/checkpoints"))[-3:] == [4, 5, 6]
    cut_back("together", "parted", 3)
    assert run(*exact, "--parallel.devices", "4", name="parted") == 0
    for name in ("together", "joined", "parted"):
        np.testing.assert_allclose(
            list(losses_of(name).values()), list(losses_of("alone").values()), rtol=1e-5
        )
        first, second = state_of("alone", 6), state_of(name, 6)
        for path, leaf in first.items():
            np.testing.assert_allclose(leaf, second[path], rtol=0, atol=1e-4, err_msg=path)
        at_3 = state_of("alone" if name == "joined" else "together", 3)
        for path, leaf in state_of(name, 3).items():
            np.testing.assert_array_equal(leaf, at_3[path], path)


@pytest.mark.slow
def test_a_signal_to_one_process_of_two_ends_both_with_a_checkpoint(here):
    options = ("--train.steps", "100000", "--checkpoint.every", "0", "--train.eval_every", "0")
    processes = spawn_two(*options, name="a")
    wait_for_step("a", 3)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    (saved,) = Path("runs/a/checkpoints").iterdir()
    assert max(losses_of("a")) == int(saved.name)
