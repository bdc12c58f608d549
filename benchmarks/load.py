"""Time and peak memory to load a file of GPT-2's shape, against transformers doing the same.

    python benchmarks/load.py --config configs/gpt2_1558m.py --dtype float32

Random weights are written once; each side then loads them in a process of its own, in turn, from a
warm page cache, looks at every parameter (transformers only maps a float32 file, and reads it when
it is used), and reports what it held at most beyond what it held before.
"""

import gc
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tyro

from jaxgpt import pretrained
from jaxgpt.config import read
from jaxgpt.pretrained import gpt2, tensors, weights


@dataclass(frozen=True)
class Options:
    """What to load, and how often."""

    config: str = "configs/gpt2_124m.py"
    """The model; its vocabulary is GPT-2's 50,257."""
    dtype: str = "float32"
    """Of the file: float32, float16 or bfloat16. Both sides load to float32."""
    rounds: int = 3
    """Loads of each side."""
    side: str = ""
    """For the processes it starts."""
    folder: str = ""
    """For the processes it starts."""


def write(options: Options, folder: Path) -> None:
    """A model of random weights, a tensor at a time."""
    cfg = replace(read(options.config).model, V=50257)
    kinds = {known.name: name for name, known in tensors.DTYPES.items()}
    sizes = weights.sizes_in_files(cfg)
    random = np.random.default_rng(0).standard_normal(cfg.D * 50257, np.float32) * 0.02
    shapes = {
        row.name: tensors.Shape(kinds[options.dtype], row.shape(sizes))
        for row in weights.rows(gpt2, cfg)
    }

    def get(name: str) -> np.ndarray:
        lengths = shapes[name].lengths
        return random[: math.prod(lengths)].reshape(lengths)

    tensors.write_folder(folder, shapes, get)
    fields = {**gpt2.write_config(cfg), "torch_dtype": options.dtype}
    (folder / "config.json").write_text(json.dumps(fields))


def jaxgpt(folder: Path) -> int:
    """Loads with jaxgpt; the bytes of the parameters."""
    import jax

    params = pretrained.read_model(folder).params()
    return look([np.asarray(leaf) for leaf in jax.tree.leaves(jax.block_until_ready(params))])


def transformers(folder: Path) -> int:
    """Loads with transformers and safetensors; the bytes of the parameters."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    return look([leaf.detach().numpy() for leaf in model.parameters()])


def look(leaves: list[np.ndarray]) -> int:
    """Reads them all; their bytes."""
    if not all(math.isfinite(leaf.sum()) for leaf in leaves):
        raise ValueError("a parameter is not finite")
    return sum(leaf.nbytes for leaf in leaves)


def held_now() -> float:
    """The memory this process has, in bytes; of Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * float(resource.getpagesize())


def peak() -> float:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def one_side(options: Options) -> None:
    """Loads, and prints the seconds, the memory before and at most, the parameters' bytes."""
    side = {"jaxgpt": jaxgpt, "transformers": transformers}[options.side]
    with tempfile.TemporaryDirectory() as small:  # so that libraries and devices are there
        tiny = replace(options, config="configs/gpt2_124m.py")
        write_tiny(tiny, Path(small))
        side(Path(small))
    gc.collect()
    before, start = held_now(), time.perf_counter()
    held = side(Path(options.folder))
    print(json.dumps([time.perf_counter() - start, before, peak(), held]))


def write_tiny(options: Options, folder: Path) -> None:
    """A model of a few thousand parameters."""
    import jax

    from jaxgpt.model import ComputeConfig, init

    cfg = replace(read(options.config).model, L=1, N=1, D=8, T=8, V=50)
    pretrained.write_model(folder, cfg, init(cfg.build(ComputeConfig()), jax.random.key(0)))


def main(options: Options) -> None:
    """Writes, loads by turns, prints both sides and their ratio."""
    if options.side:
        return one_side(options)
    names = ("jax", "numpy", "torch", "transformers", "safetensors")
    print(f"{platform.machine()}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in names))
    with tempfile.TemporaryDirectory() as folder:
        write(options, Path(folder))
        largest = max(
            math.prod(tensor.shape) * 4 for tensor in tensors.read_folder(Path(folder)).values()
        )
        results: dict[str, list[list[float]]] = {"jaxgpt": [], "transformers": []}
        for _ in range(options.rounds):
            for side, runs in results.items():
                command = [sys.executable, __file__, "--side", side, "--folder", folder]
                runs.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    print(f"\n{'':14}{'seconds':>9}{'parameters GB':>15}{'peak GB':>9}{'over, in tensors':>18}")
    for side, runs in results.items():
        seconds = statistics.median(run[0] for run in runs)
        _, before, most, held = max(runs, key=lambda run: run[2] - run[1])
        over = (most - before - held) / largest
        print(f"{side:14}{seconds:9.2f}{held / 1e9:15.2f}{(most - before) / 1e9:9.2f}{over:18.2f}")
    times = [statistics.median(run[0] for run in runs) for runs in results.values()]
    print(
        f"\nover: what was held beyond the parameters, in largest tensors ({largest / 1e6:.0f} MB)"
    )
    print(f"transformers / jaxgpt: {times[1] / times[0]:.2f} times the seconds")


if __name__ == "__main__":
    main(tyro.cli(Options))
