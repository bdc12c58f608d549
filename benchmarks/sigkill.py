"""Kills a run at random moments and shows that it ends bit-equal to one that was not killed.

    python benchmarks/sigkill.py --kills 20

A run of 40 steps with dropout and shuffling is started again after each SIGKILL, by the same
command. A round is one kill: the run is killed once, at a random moment of its life, and then goes
on to its end; every array of its last checkpoint is compared with the whole run's.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent.parent
OPTIONS = [
    "--model.L=2",
    "--model.D=32",
    "--model.N=2",
    "--model.T=16",
    "--model.dropout=0.1",
    "--optim.warmup=2",
    "--optim.ema=0.9",
    "--train.steps=40",
    "--train.log_every=1",
    "--train.eval_every=0",
    "--train.sample_tokens=0",
    "--checkpoint.every=4",
    "--tokenizer.kind=bytes",
    "--data.paths",
    "text.txt",
]


def start(folder: Path, name: str) -> subprocess.Popen:
    """The command of a run, in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "--name", name, *OPTIONS]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def state(folder: Path, name: str) -> dict[str, Any]:
    """The bytes of every array in the last checkpoint, and the losses of all steps."""
    import jax

    from jaxgpt import checkpoint
    from jaxgpt.telemetry import read_metrics

    run = folder / "runs" / name
    found: dict[str, Any] = {}
    for item in checkpoint.read(run / "checkpoints" / "40")["leaves"]:
        tree = checkpoint.load_params(run / "checkpoints" / "40", item=item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found[f"{item}{jax.tree_util.keystr(path)}"] = jax.device_get(leaf).tobytes()
    losses = {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r}
    return found | {"losses": losses}


def main(kills: int = 20, seed: int = 0) -> int:
    """Kill so many runs, each once; exits with 1 if one ends differently."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("".join(rng.choices("abcdefgh \n", k=20_000)))
        start(folder, "warm").wait()  # fills the compilation cache
        began = time.monotonic()
        start(folder, "whole").wait()
        life = time.monotonic() - began
        whole = state(folder, "whole")
        print(f"the whole run takes {life:.1f} s and leaves {len(whole) - 1} arrays")
        equal = 0
        for number in range(kills):
            run = f"killed{number}"
            process = start(folder, run)
            time.sleep(rng.uniform(0, life))
            process.send_signal(signal.SIGKILL)
            process.wait()
            step = sum(1 for _ in (folder / "runs" / run).glob("checkpoints/*"))
            start(folder, run).wait()
            same = state(folder, run) == whole
            equal += same
            print(
                f"kill {number + 1:>2}: {step} checkpoints then, {'equal' if same else 'DIFFERS'}"
            )
        print(f"{equal} of {kills} bit-equal")
    return 0 if equal == kills else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
