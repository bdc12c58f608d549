"""Peak memory and time of saving a checkpoint, beside the state that is saved.

    python benchmarks/save.py --config configs/gpt2_124m.py
    python benchmarks/save.py --config configs/gpt2_1558m.py --base nf4 --layers scan

The state is that of the config's run, filled with random bytes: of all parameters, or with --base
of LoRA on every matrix over frozen weights in that format. It is saved twice, and each save's peak
is that of the process from the call until the checkpoint is complete. Linux only.
"""

import ctypes
import gc
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401  (so that it is part of the memory before)
import tyro

from jaxgpt.config import read
from jaxgpt.training.checkpoint import Checkpoints
from jaxgpt.training.finetune import TuneConfig
from jaxgpt.training.setup import build_network, build_optimizer, new_state
from jaxgpt.training.step import to_saved


@dataclass(frozen=True)
class Options:
    """The run whose state is saved."""

    config: str = "configs/gpt2_124m.py"
    """The model; its vocabulary is GPT-2's 50,257."""
    base: Literal["", "float32", "int8", "int4", "nf4"] = ""
    """Format of the frozen weights under LoRA; empty: all parameters are trained."""
    layers: Literal["unrolled", "scan"] = "unrolled"
    """Separate or stacked layers."""


def memory(name: str) -> float:
    """A figure of this process in gigabytes: VmRSS, the memory it has, or VmHWM, its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e9


def main(options: Options) -> None:
    """Makes the state, saves it, and prints memory and time."""
    cfg = read(options.config)
    tune = TuneConfig("lora", base=options.base, matrices=("blocks/*",)) if options.base else None
    cfg = replace(
        cfg,
        model=replace(cfg.model, V=50257),
        compute=replace(cfg.compute, layers=options.layers),
        tune=tune or cfg.tune,
    )
    network = build_network(cfg, None)
    tx = build_optimizer(cfg, network)
    random = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        count = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        return jax.device_put(np.frombuffer(random.bytes(count), leaf.dtype).reshape(leaf.shape))

    state = network.layout.place(
        jax.tree.map(fill, jax.eval_shape(lambda: new_state(cfg, network, tx)))
    )
    jax.block_until_ready(state)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state._replace(key=state.step)))
    print(f"{platform.machine()}, jax {version('jax')}, orbax {version('orbax-checkpoint')}")
    print(f"state {size / 1e9:.2f} GB, memory before {memory('VmRSS'):.2f} GB")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        for step in (1, 2):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the memory of now
            began = time.perf_counter()
            checkpoints.save(step, to_saved(state, cfg.model.L, network.scanned), {})
            returned = time.perf_counter() - began
            checkpoints.wait()
            print(
                f"save {step}: peak {memory('VmHWM'):.2f} GB, returned after {returned:.2f} s, "
                f"complete after {time.perf_counter() - began:.2f} s"
            )
        files = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        print(f"size on disk {files / 2e9:.2f} GB")
        checkpoints.close()


if __name__ == "__main__":
    main(tyro.cli(Options))
