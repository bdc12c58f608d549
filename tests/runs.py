"""Runs of `train.py` that take seconds, in the working folder, and what is read of them."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import train
from jaxgpt.training import checkpoint
from tests.tiny import ROOT

ALL = ("--parallel.devices", "0")  # all devices of a process, of which a test has eight
WORDS = ("the quick brown fox jumps over a lazy dog", "while wizards hex bold jackals")

# A run of seconds, with all that is random in it: dropout, shuffling, an average of parameters.
TINY = """
from jaxgpt.training.checkpoint import CheckpointConfig
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import DataConfig
from jaxgpt.model import GPTConfig
from jaxgpt.training.optim import OptimConfig
from jaxgpt.sharding import ParallelConfig
from jaxgpt.tokenizer import TokenizerConfig

config = Config(
    model=GPTConfig(L=1, D=32, N=2, T=16, dropout=0.1),
    tokenizer=TokenizerConfig(kind="characters"),
    data=DataConfig(paths=("text.txt",)),
    optim=OptimConfig(learning_rate=1e-2, warmup=2, ema=0.9),
    train=TrainConfig(steps=6, batch=8, log_every=1, eval_every=3, sample_tokens=0),
    checkpoint=CheckpointConfig(every=3, keep=9),
    parallel=ParallelConfig(devices=1),
)
"""


def settle(folder, monkeypatch):
    """Works in a folder with a config and a text."""
    rng = random.Random(0)
    (folder / "text.txt").write_text(" ".join(rng.choices(" ".join(WORDS).split(), k=2000)))
    (folder / "tiny.py").write_text(TINY)
    monkeypatch.chdir(folder)


def run(*options: str, name: str = "a", config: str = "tiny.py") -> int:
    return train.main([config, "--name", name, *options])


def state_of(name: str, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by path; of the random key, its numbers."""
    folder = Path("runs") / name / "checkpoints" / str(step)
    state = {}
    for item in checkpoint.read_metadata(folder)["leaves"]:
        tree = checkpoint.load_params(folder, item=item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            state[f"{item}/{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return state


def losses_of(name: str) -> dict[int, float]:
    lines = (Path("runs") / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


def assert_same_run(one: str, other: str, step: int) -> None:
    first, second = state_of(one, step), state_of(other, step)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], path, strict=True)
    assert losses_of(one) == losses_of(other)


def cut_back(name: str, to: str, step: int) -> None:
    """Copies a run as it was when it had only the checkpoint of one step."""
    shutil.copytree(Path("runs") / name, Path("runs") / to)
    for folder in (Path("runs") / to / "checkpoints").iterdir():
        if folder.name != str(step):
            shutil.rmtree(folder)


def spawn(
    *options, name, devices=1, program=(str(ROOT / "train.py"),), config="tiny.py"
) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}  # of two flags the last
    args = [sys.executable, *program, config, "--name", name, *options]
    return subprocess.Popen(
        args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(name: str, step: int) -> None:
    """Until the log of a run in another process has a step."""
    for _ in range(1200):
        if (Path("runs") / name / "metrics.jsonl").exists() and step in losses_of(name):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{name} never took step {step}")


def spawn_two(*options: str, name: str, **settings) -> list[subprocess.Popen]:
    """A run of two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ("--parallel.processes", "2", "--parallel.coordinator", address)
    return [
        spawn(*ALL, *options, *together, "--parallel.process", n, name=name, devices=2, **settings)
        for n in "01"
    ]


def flip(file) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(Path(file).read_bytes())
    content[len(content) // 2] ^= 1
    Path(file).write_bytes(content)
